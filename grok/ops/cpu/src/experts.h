// The experts that rows chose: y_r = sum over a row's experts of weight * down(act(gate) * up).
// Arguments: layer, x (R, D), the weights (R, C) float32 and int32 numbers (R, C) of the experts
// chosen (E: none), then values and, of ints, scales of gate (L, E, D, F), up (L, E, D, F) and
// down (L, E, F, D). Result: y (R, D) float32.
#pragma once

enum activation { GELU_TANH, GELU, SILU };

// gate <- act(gate) * up, rounded to bfloat16 where `is_rounded`.
static void activate(enum activation activation, bool is_rounded, float *gate, const float *up,
                     int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    float g[LANES] = {0}, u[LANES] = {0};
    int64_t lanes = smaller(LANES, count - i);
    memcpy(g, gate + i, lanes * sizeof(float));
    memcpy(u, up + i, lanes * sizeof(float));
    vfloat x = load(g), half = {0};
    if (activation == GELU) {
      for (int lane = 0; lane < LANES; lane++) {
        half[lane] = x[lane] * 0.5f * erfcf(-0.70710678f * x[lane]);
      }
      x = half;
    } else {
      // x (1 + tanh u) / 2 = x / (1 + exp(-2 u)).
      vfloat exponent = activation == SILU ? -x : x * (-1.5957691f - 0.071354816f * x * x);
      x = x / (1.0f + exp_of(exponent));
    }
    x *= load(u);
    store(g, is_rounded ? to_bfloat16s(x) : x);
    memcpy(gate + i, g, lanes * sizeof(float));
  }
}

typedef struct {
  const XLA_FFI_Buffer *values[3], *scales[3];
  enum type types[3];
  enum activation activation;
  bool is_rounded;
  int64_t layer, E, R, C, D, F;
  int64_t *first;      // pair of each expert that has some, and the number of all
  int64_t *experts;    // those that have pairs
  int64_t *pairs;      // R * C of each row and choice; -1 where there is no such expert
  int64_t num_experts;
  const float **x;     // of each pair
  float **gates, **ups, **outputs;  // of each pair: F, F and D floats
  Product *products;   // two of each expert
  const float *weights;
  float *y;
} ExpertsWork;

// The product of the pairs of an expert with its matrix of kind `i`.
static Product expert_product(const ExpertsWork *work, int i, int64_t e, const float *const *x,
                              float *const *y) {
  int64_t index = work->layer * work->E + work->experts[e], first = work->first[e];
  return (Product){.w = matrix_of(work->values[i], work->scales[i], work->types[i], index),
                   .x = x + first,
                   .y = y + first,
                   .rows = work->first[e + 1] - first};
}

static void activate_chunk(void *data, int64_t pair) {
  const ExpertsWork *work = data;
  activate(work->activation, work->is_rounded, work->gates[pair], work->ups[pair], work->F);
}

// A row's experts, in the order of their numbers.
static void combine_chunk(void *data, int64_t row) {
  const ExpertsWork *work = data;
  float *y = work->y + row * work->D;
  memset(y, 0, work->D * sizeof(float));
  const int64_t *pairs = work->pairs + row * work->C;
  for (int64_t last = -1;;) {
    int64_t choice = -1;
    for (int64_t c = 0; c < work->C; c++) {
      if (pairs[c] > last && (choice < 0 || pairs[c] < pairs[choice])) choice = c;
    }
    if (choice < 0) return;
    last = pairs[choice];
    const float *output = work->outputs[last];
    float weight = work->weights[row * work->C + choice];
    for (int64_t d = 0; d < work->D; d++) y[d] += weight * output[d];
  }
}

// Numbers the pairs by expert, and by row within one.
static void sort_pairs(ExpertsWork *work, const int32_t *ids, const float *const *inputs) {
  int64_t next = 0, total = work->R * work->C;
  for (int64_t i = 0; i < total; i++) work->pairs[i] = -1;
  for (int64_t expert = 0; expert < work->E; expert++) {
    work->first[work->num_experts] = next;
    for (int64_t i = 0; i < total; i++) {
      if (ids[i] != expert || !inputs[i / work->C]) continue;
      work->x[next] = inputs[i / work->C];
      work->pairs[i] = next++;
    }
    if (next > work->first[work->num_experts]) work->experts[work->num_experts++] = expert;
  }
  work->first[work->num_experts] = next;
}

static XLA_FFI_Error *experts(XLA_FFI_CallFrame *frame) {
  if (is_query(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 1), *ids = argument(frame, 3);
  ExpertsWork work = {.layer = *(const int32_t *)argument(frame, 0)->data,
                      .weights = argument(frame, 2)->data,
                      .y = result(frame, 0)->data,
                      .is_rounded = x->dtype == XLA_FFI_DataType_BF16,
                      .activation = (enum activation)attribute(frame, "activation"),
                      .R = x->dims[0],
                      .C = ids->dims[1],
                      .D = x->dims[1]};
  int64_t next = 4;
  for (int i = 0; i < 3; i++) {
    work.values[i] = argument(frame, next++);
    if (!type_of(work.values[i]->dtype, work.is_rounded, &work.types[i])) {
      return error_of(frame, "experts of this type have no kernel");
    }
    if (work.types[i] >= INT8) work.scales[i] = argument(frame, next++);
  }
  work.E = work.values[0]->dims[1], work.F = work.values[0]->dims[3];
  int64_t R = work.R, D = work.D, F = work.F, P = R * work.C;
  size_t numbers = (2 * work.E + 1 + P) * sizeof(int64_t), addresses = (R + 4 * P) * sizeof(void *);
  int64_t *tables = room(TABLES, numbers + addresses + 2 * work.E * sizeof(Product));
  work.first = tables, work.experts = tables + work.E + 1, work.pairs = work.experts + work.E;
  work.x = (const float **)(work.pairs + P);
  work.gates = (float **)(work.x + P + R), work.ups = work.gates + P, work.outputs = work.ups + P;
  work.products = (Product *)(work.outputs + P);
  float *floats = room(INPUTS, (R * D + P * (2 * F + D)) * sizeof(float));
  inputs_of(x, floats, work.x + P);
  floats += R * D;
  for (int64_t pair = 0; pair < P; pair++, floats += 2 * F + D) {
    work.gates[pair] = floats, work.ups[pair] = floats + F, work.outputs[pair] = floats + 2 * F;
  }
  sort_pairs(&work, ids->data, work.x + P);
  int64_t E = work.num_experts, num_pairs = work.first[E];
  for (int64_t e = 0; e < E; e++) {
    work.products[2 * e] = expert_product(&work, 0, e, work.x, work.gates);
    work.products[2 * e + 1] = expert_product(&work, 1, e, work.x, work.ups);
  }
  run_products(frame, work.products, 2 * E);
  run_chunks(frame, num_threads(frame, 8 * num_pairs * F), num_pairs, activate_chunk, &work);
  for (int64_t e = 0; e < E; e++) {
    work.products[e] = expert_product(&work, 2, e, (const float *const *)work.gates, work.outputs);
  }
  run_products(frame, work.products, E);
  run_chunks(frame, smaller(num_threads(frame, 4 * R * D), R), R, combine_chunk, &work);
  return NULL;
}

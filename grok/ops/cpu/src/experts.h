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
  int64_t layer, E, R, C, D, F, hidden_width, output_width;
  int64_t *first;      // pair of each expert that has some, and the number of all
  int64_t *experts;    // those that have pairs
  int64_t *pairs;      // R * C of each row and choice; -1 where there is no such expert
  int64_t num_experts;
  const float **x;     // of each pair
  float *hidden, *output;  // (P, F), (P, D)
  const float *weights;
  float *y;
} ExpertsWork;

static Matrix expert_matrix(const ExpertsWork *work, int i, int64_t expert) {
  int64_t index = work->layer * work->E + expert;
  return matrix_of(work->values[i], work->scales[i], work->types[i], index);
}

static void hidden_chunk(void *data, int64_t index) {
  const ExpertsWork *work = data;
  int64_t stripes = stripes_of(work->F, work->hidden_width), e = index / stripes;
  int64_t begin = index % stripes * work->hidden_width, end = smaller(begin + work->hidden_width, work->F);
  int64_t first = work->first[e], rows = work->first[e + 1] - first;
  Matrix gate = expert_matrix(work, 0, work->experts[e]);
  Matrix up = expert_matrix(work, 1, work->experts[e]);
  float **sums = sums_of(SUMS, 2 * rows), **spare = sums_of(SPARE, rows);
  for (int64_t m = 0; m < rows; m++) sums[m] = work->hidden + (first + m) * work->F + begin;
  multiply_stripe(&gate, work->x + first, rows, begin, end, sums, spare);
  multiply_stripe(&up, work->x + first, rows, begin, end, sums + rows, spare);
  for (int64_t m = 0; m < rows; m++) {
    activate(work->activation, work->is_rounded, sums[m], sums[rows + m], end - begin);
  }
}

static void output_chunk(void *data, int64_t index) {
  const ExpertsWork *work = data;
  int64_t stripes = stripes_of(work->D, work->output_width), e = index / stripes;
  int64_t begin = index % stripes * work->output_width, end = smaller(begin + work->output_width, work->D);
  int64_t first = work->first[e], rows = work->first[e + 1] - first;
  Matrix down = expert_matrix(work, 2, work->experts[e]);
  float **spare = sums_of(SPARE, rows), **addresses = room(SUMS, 2 * rows * sizeof(void *));
  const float **hidden = (const float **)(addresses + rows);
  for (int64_t m = 0; m < rows; m++) {
    hidden[m] = work->hidden + (first + m) * work->F;
    addresses[m] = work->output + (first + m) * work->D + begin;
  }
  multiply_stripe(&down, hidden, rows, begin, end, addresses, spare);
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
    const float *output = work->output + last * work->D;
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
  int64_t *tables = room(TABLES, (2 * work.E + 1 + P) * sizeof *tables + (P + R) * sizeof(void *));
  work.first = tables, work.experts = tables + work.E + 1, work.pairs = work.experts + work.E;
  work.x = (const float **)(work.pairs + P);
  float *floats = room(INPUTS, (R * D + P * (F + D)) * sizeof(float));
  work.hidden = floats + R * D, work.output = work.hidden + P * F;
  inputs_of(x, floats, work.x + P);
  sort_pairs(&work, ids->data, work.x + P);
  int64_t E = work.num_experts;
  int64_t threads = num_threads(frame, E * bytes_of(work.types[0], D * F));
  work.hidden_width = stripe_width(work.types[0], F, E, threads);
  work.output_width = stripe_width(work.types[2], D, E, threads);
  run_chunks(frame, threads, E * stripes_of(F, work.hidden_width), hidden_chunk, &work);
  run_chunks(frame, threads, E * stripes_of(D, work.output_width), output_chunk, &work);
  run_chunks(frame, smaller(threads, 1 + R * D / (1 << 16)), R, combine_chunk, &work);
  return NULL;
}

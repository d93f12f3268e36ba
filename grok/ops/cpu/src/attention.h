// Attention of one new token of each sequence over its pages. Arguments: layer, q (U, N, H), pages
// (L, P, S, K, 2, H) of floats, the sequences' pages (U, M), positions (U) of the tokens, and
// whether (U) there is one. Result: o (U, N, H) float32; zeros where there is none.
//
// Letters: U sequences, N heads, K kv heads, G = N / K queries of one, H head_dim, L layers, P pages
// of S tokens, M pages of the longest sequence.
#pragma once

#define AHEAD 8  // positions

typedef struct {
  enum type type;
  const void *pages;
  const int32_t *table, *start, *count;
  const float *q;
  float *o;
  int64_t layer, P, S, K, G, H, M;
  int64_t window, temperature_length;  // 0: none
  float scale, softcap;                // no cap: 0
} AttentionWork;

// Index of the key of a kv head at a position of a sequence; its value is H further.
INLINE int64_t key_index(const AttentionWork *work, int64_t u, int64_t head, int64_t position) {
  int64_t page = work->table[u * work->M + position / work->S];
  page = page < 0 ? 0 : smaller(page, work->P - 1);
  int64_t token = (work->layer * work->P + page) * work->S + position % work->S;
  return (token * work->K + head) * 2 * work->H;
}

INLINE float dot_of(enum type type, const float *q, const void *keys, int64_t index, int64_t H) {
  vfloat sums = {0};
  int64_t h = 0;
  for (; h + LANES <= H; h += LANES) sums += load(q + h) * weights_at(type, keys, index + h);
  float sum = sum_of(sums);
  for (; h < H; h++) sum += q[h] * weight_at(type, keys, index + h);
  return sum;
}

// Asks for the key, or the value, of a position to come.
INLINE void fetch_ahead(enum type type, const AttentionWork *work, int64_t index) {
  const char *at = address_of(type, work->pages, index + AHEAD * 2 * work->K * work->H);
  for (int64_t byte = 0; byte < bytes_of(type, work->H); byte += 64) __builtin_prefetch(at + byte);
}

// Logits as of `grok.ops.attention.causal.scaled_logits`.
static void scale_logits(const AttentionWork *work, float *logits, int64_t count, int64_t position) {
  float factor = 1;
  if (work->temperature_length && position > work->temperature_length) {
    factor = log2f(position) / log2f(work->temperature_length);
  }
  for (int64_t i = 0; i < count; i += LANES) {
    float lanes[LANES] = {0};
    int64_t size = smaller(LANES, count - i) * sizeof(float);
    memcpy(lanes, logits + i, size);
    vfloat logit = load(lanes) * work->scale;
    if (work->softcap > 0) logit = work->softcap * tanh_of(logit / work->softcap);
    store(lanes, logit * factor);
    memcpy(logits + i, lanes, size);
  }
}

// Softmax; the weights are rounded where the values are bfloat16.
static void soften(float *logits, int64_t count, bool is_rounded) {
  float largest = logits[0], total = 0;
  for (int64_t i = 1; i < count; i++) largest = logits[i] > largest ? logits[i] : largest;
  int64_t i = 0;
  vfloat totals = {0};
  for (; i + LANES <= count; i += LANES) {
    vfloat weights = exp_of(load(logits + i) - largest);
    store(logits + i, weights);
    totals += weights;
  }
  total = sum_of(totals);
  for (; i < count; i++) {
    logits[i] = exp_of((vfloat){0} + (logits[i] - largest))[0];
    total += logits[i];
  }
  for (i = 0; i < count; i++) {
    float weight = logits[i] / total;
    logits[i] = is_rounded ? to_bfloat16(weight) : weight;
  }
}

INLINE void add_value(enum type type, float weight, const void *values, int64_t index, int64_t H,
                      float *o) {
  int64_t h = 0;
  for (; h + LANES <= H; h += LANES) {
    store(o + h, load(o + h) + weight * weights_at(type, values, index + h));
  }
  for (; h < H; h++) o[h] += weight * weight_at(type, values, index + h);
}

INLINE void attend_of(enum type type, const AttentionWork *work, int64_t u, int64_t head) {
  int64_t G = work->G, H = work->H, position = work->start[u], first = 0;
  if (work->window && position >= work->window) first = position - work->window + 1;
  int64_t count = position + 1 - first;
  const float *q = work->q + (u * work->K + head) * G * H;
  float *o = work->o + (u * work->K + head) * G * H;
  memset(o, 0, G * H * sizeof(float));
  if (work->count[u] <= 0) return;
  float *logits = room(SUMS, G * count * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    int64_t key = key_index(work, u, head, first + i);
    fetch_ahead(type, work, key);
    for (int64_t g = 0; g < G; g++) {
      logits[g * count + i] = dot_of(type, q + g * H, work->pages, key, H);
    }
  }
  for (int64_t g = 0; g < G; g++) {
    scale_logits(work, logits + g * count, count, position);
    soften(logits + g * count, count, type == BFLOAT16);
  }
  for (int64_t i = 0; i < count; i++) {
    int64_t value = key_index(work, u, head, first + i) + H;
    fetch_ahead(type, work, value);
    for (int64_t g = 0; g < G; g++) {
      add_value(type, logits[g * count + i], work->pages, value, H, o + g * H);
    }
  }
}

static void attention_chunk(void *data, int64_t index) {
  const AttentionWork *work = data;
  int64_t u = index / work->K, head = index % work->K;
  if (work->type == FLOAT32) {
    attend_of(FLOAT32, work, u, head);
  } else {
    attend_of(BFLOAT16, work, u, head);
  }
}

static XLA_FFI_Error *attention(XLA_FFI_CallFrame *frame) {
  if (is_query(frame)) return NULL;
  const XLA_FFI_Buffer *q = argument(frame, 1), *pages = argument(frame, 2);
  const XLA_FFI_Buffer *table = argument(frame, 3);
  int64_t U = q->dims[0], N = q->dims[1], H = q->dims[2], size = U * N * H;
  AttentionWork work = {.pages = pages->data,
                        .table = table->data,
                        .start = argument(frame, 4)->data,
                        .count = argument(frame, 5)->data,
                        .q = q->data,
                        .o = result(frame, 0)->data,
                        .layer = *(const int32_t *)argument(frame, 0)->data,
                        .P = pages->dims[1],
                        .S = pages->dims[2],
                        .K = pages->dims[3],
                        .G = N / pages->dims[3],
                        .H = H,
                        .M = table->dims[1],
                        .window = attribute(frame, "window"),
                        .temperature_length = attribute(frame, "temperature_length"),
                        .scale = float_attribute(frame, "scale"),
                        .softcap = float_attribute(frame, "softcap")};
  if (!type_of(pages->dtype, false, &work.type) || work.type > BFLOAT16) {
    return error_of(frame, "pages of this type have no kernel");
  }
  if (q->dtype == XLA_FFI_DataType_BF16) {
    float *floats = room(INPUTS, size * sizeof(float));
    for (int64_t i = 0; i < size; i++) floats[i] = from_bfloat16(((const uint16_t *)q->data)[i]);
    work.q = floats;
  }
  int64_t tokens = 0;
  for (int64_t u = 0; u < U; u++) tokens += work.count[u] > 0 ? work.start[u] + 1 : 0;
  int64_t threads = num_threads(frame, bytes_of(work.type, tokens * 2 * work.K * H));
  run_chunks(frame, threads, U * work.K, attention_chunk, &work);
  return NULL;
}

// The likeliest token of each row of scores, and the logarithm of the sum of their exponentials.
#pragma once

typedef struct {
  const float *scores;
  const uint8_t *banned;  // a bit for each token, the lowest first
  int64_t length, bytes;  // of a row of each
  int32_t *tokens;
  float *sums;
} SamplingWork;

// The bits of LANES tokens from `token` on, of which the first is a multiple of LANES.
INLINE uint32_t bits_at(const uint8_t *banned, int64_t token) {
#if LANES == 16
  return banned[token / 8] | (uint32_t)banned[token / 8 + 1] << 8;
#else
  return banned[token / 8] >> token % 8 & ((1 << LANES) - 1);
#endif
}

static void argmax_row(void *data, int64_t row) {
  const SamplingWork *work = data;
  const float *scores = work->scores + row * work->length;
  const uint8_t *banned = work->banned + row * work->bytes;
  float best = -INFINITY;
  vfloat best_of = (vfloat){0} - INFINITY;
  vint at = {0}, best_at, numbers;
  int64_t token = 0, first = 0;
  for (int lane = 0; lane < LANES; lane++) numbers[lane] = lane;
  best_at = numbers;
  for (; token + LANES <= work->length; token += LANES, at += LANES) {
    vfloat values = load(scores + token);
    uint32_t bits = bits_at(banned, token);
    for (; bits; bits &= bits - 1) values[__builtin_ctz(bits)] = -INFINITY;
    vint is_better = values > best_of;
    best_of = (vfloat)(((vint)values & is_better) | ((vint)best_of & ~is_better));
    best_at = ((numbers + at) & is_better) | (best_at & ~is_better);
  }
  for (int lane = 0; lane < LANES; lane++) {
    bool is_earlier = best_of[lane] == best && best_at[lane] < first;
    if (best_of[lane] > best || is_earlier) best = best_of[lane], first = best_at[lane];
  }
  for (; token < work->length; token++) {
    bool is_banned = banned[token / 8] >> token % 8 & 1;
    if (!is_banned && scores[token] > best) best = scores[token], first = token;
  }
  work->tokens[row] = first;
}

// Arguments: scores (R, V) float32, bits of what is banned (R, V / 8 rounded up); result: the first of
// the largest scores that are not banned, (R,) int32; token 0 where none is above -infinity.
static XLA_FFI_Error *argmax(XLA_FFI_CallFrame *frame) {
  if (is_query(frame)) return NULL;
  const XLA_FFI_Buffer *scores = argument(frame, 0), *banned = argument(frame, 1);
  SamplingWork work = {.scores = scores->data,
                       .banned = banned->data,
                       .length = scores->dims[1],
                       .bytes = banned->dims[1],
                       .tokens = result(frame, 0)->data};
  int64_t rows = scores->dims[0];
  run_chunks(frame, num_threads(frame, 4 * rows * work.length), rows, argmax_row, &work);
  return NULL;
}

static void logsumexp_row(void *data, int64_t row) {
  const SamplingWork *work = data;
  const float *scores = work->scores + row * work->length;
  vfloat largest_of = (vfloat){0} - INFINITY, sums = {0};
  vint is_number = largest_of == largest_of;
  int64_t token = 0;
  for (; token + LANES <= work->length; token += LANES) {
    vfloat values = load(scores + token);
    vint is_larger = values > largest_of;
    largest_of = (vfloat)(((vint)values & is_larger) | ((vint)largest_of & ~is_larger));
    is_number &= values == values;
  }
  float largest = -INFINITY, rest = 0;
  for (int lane = 0; lane < LANES; lane++) {
    largest = fmaxf(largest, is_number[lane] ? largest_of[lane] : INFINITY);
  }
  for (int64_t last = token; last < work->length; last++) {
    largest = fmaxf(largest, scores[last] == scores[last] ? scores[last] : INFINITY);
  }
  for (; token < work->length; token++) rest += expf(scores[token] - largest);
  for (token = 0; token + LANES <= work->length; token += LANES) {
    sums += exp_of(load(scores + token) - largest);
  }
  work->sums[row] = isfinite(largest) ? largest + logf(sum_of(sums) + rest) : largest;
}

// Argument: scores (R, V) float32; result: the logarithm of the sum of their exponentials, (R,);
// infinity where one is no number.
static XLA_FFI_Error *logsumexp(XLA_FFI_CallFrame *frame) {
  if (is_query(frame)) return NULL;
  const XLA_FFI_Buffer *scores = argument(frame, 0);
  SamplingWork work = {
      .scores = scores->data, .length = scores->dims[1], .sums = result(frame, 0)->data};
  int64_t rows = scores->dims[0];
  run_chunks(frame, num_threads(frame, 4 * rows * work.length), rows, logsumexp_row, &work);
  return NULL;
}

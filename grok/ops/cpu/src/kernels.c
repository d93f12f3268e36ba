// Kernels for XLA on CPU: products of few rows with matrices as they are stored, and the experts
// that a few rows chose. `grok/ops/cpu/calls.py` has what they compute.
//
// Letters: L layers, R rows, C chosen experts of a row, P pairs of a row and an expert, D embed,
// F columns, E experts.

#include "frame.h"
#include "products.h"

// A buffer that a thread keeps from call to call: fresh memory would be mapped anew each time.
static void *room(int which, size_t bytes) {
  static _Thread_local struct {
    void *data;
    size_t bytes;
  } rooms[5];
  if (rooms[which].bytes < bytes) {
    free(rooms[which].data);
    rooms[which].data = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!rooms[which].data) abort();
    rooms[which].bytes = bytes;
  }
  return rooms[which].data;
}

enum { INPUTS, TABLES, PARTS, SUMS, SPARE };

static bool type_of(XLA_FFI_DataType dtype, bool is_rounded, enum type *type) {
  switch (dtype) {
    case XLA_FFI_DataType_F32: *type = is_rounded ? ROUNDED : FLOAT32; return true;
    case XLA_FFI_DataType_BF16: *type = BFLOAT16; return true;
    case XLA_FFI_DataType_S8: *type = INT8; return true;
    case XLA_FFI_DataType_S4: *type = INT4; return true;
    default: return false;
  }
}

// Matrix `index` of values (..., rows, columns) and scales (..., groups, columns).
static Matrix matrix_of(const XLA_FFI_Buffer *values, const XLA_FFI_Buffer *scales, enum type type,
                        int64_t index) {
  const int64_t *dims = values->dims + values->rank - 2;
  Matrix w = {.type = type, .rows = dims[0], .columns = dims[1], .groups = 1};
  w.values = address_of(type, values->data, index * w.rows * w.columns);
  if (type == INT8 || type == INT4) {
    w.groups = scales->dims[scales->rank - 2];
    w.scales = (const uint16_t *)scales->data + index * w.groups * w.columns;
  }
  return w;
}

// The rows of x, those of float32 where they lie, with their number; a row of zeros has no address.
static int64_t inputs_of(const XLA_FFI_Buffer *x, float *floats, const float **rows) {
  int64_t count = x->dims[0], length = x->dims[1];
  for (int64_t r = 0; r < count; r++) {
    const float *row = (const float *)x->data + r * length;
    if (x->dtype == XLA_FFI_DataType_BF16) {
      const uint16_t *bits = (const uint16_t *)x->data + r * length;
      for (int64_t d = 0; d < length; d++) floats[r * length + d] = from_bfloat16(bits[d]);
      row = floats + r * length;
    }
    bool is_zero = true;
    for (int64_t d = 0; d < length && is_zero; d++) is_zero = row[d] == 0;
    rows[r] = is_zero ? NULL : row;
  }
  return count;
}

// Rows of x that are not zero, and the same rows of a result.
typedef struct {
  const float **x;
  float **y;
  int64_t count;
} Rows;

static Rows rows_of(const XLA_FFI_Buffer *x, const float *const *inputs, float *y, int64_t pitch,
                    const float **live_x, float **live_y) {
  Rows rows = {live_x, live_y, 0};
  for (int64_t r = 0; r < x->dims[0]; r++) {
    if (inputs[r]) {
      live_x[rows.count] = inputs[r];
      live_y[rows.count++] = y + r * pitch;
    } else {
      memset(y + r * pitch, 0, pitch * sizeof(float));
    }
  }
  return rows;
}

#include "shared_products.h"

// ---- Products with matrices of one layer. Arguments: layer, x (R, D), then for each matrix its
// values (L, D, F) and, of ints, scales (L, groups, F); results y (R, F) float32 of each.

#define MAX_MATRICES 4

static XLA_FFI_Error *multiply(XLA_FFI_CallFrame *frame) {
  if (is_query(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 1);
  int64_t layer = *(const int32_t *)argument(frame, 0)->data, R = x->dims[0], D = x->dims[1];
  int64_t num = frame->rets.size, next = 2;
  if (num > MAX_MATRICES) return error_of(frame, "a call has four matrices at most");
  Product products[MAX_MATRICES];
  const float **inputs = room(TABLES, R * (1 + 2 * num) * sizeof(void *));
  const float **table = inputs + R;
  inputs_of(x, room(INPUTS, R * D * sizeof(float)), inputs);
  for (int64_t i = 0; i < num; i++, table += 2 * R) {
    const XLA_FFI_Buffer *values = argument(frame, next++), *scales = NULL;
    enum type type;
    if (!type_of(values->dtype, x->dtype == XLA_FFI_DataType_BF16, &type)) {
      return error_of(frame, "weights of this type have no kernel");
    }
    if (type == INT8 || type == INT4) scales = argument(frame, next++);
    Matrix w = matrix_of(values, scales, type, layer);
    float *y = result(frame, i)->data;
    Rows rows = rows_of(x, inputs, y, w.columns, table, (float **)(table + R));
    products[i] = (Product){.w = w, .x = rows.x, .y = rows.y, .rows = rows.count};
  }
  run_products(frame, products, num);
  return NULL;
}

// ---- Products with the rows of a table. Arguments: x (R, D), table (V, D), and of int8 the scale
// of each row (V); result y (R, V).

typedef struct {
  Matrix w;
  Rows rows;
  int64_t height;
} ScoreWork;

static void score_chunk(void *data, int64_t index) {
  const ScoreWork *work = data;
  int64_t begin = index * work->height, end = smaller(begin + work->height, work->w.rows);
  dot_block(&work->w, work->rows.x, work->rows.count, begin, end, work->rows.y);
  for (int64_t m = 0; work->w.scales && m < work->rows.count; m++) {
    for (int64_t n = begin; n < end; n++) {
      work->rows.y[m][n] *= from_bfloat16(work->w.scales[n]);
    }
  }
}

static XLA_FFI_Error *score(XLA_FFI_CallFrame *frame) {
  if (is_query(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 0), *table = argument(frame, 1);
  int64_t R = x->dims[0], D = x->dims[1];
  enum type type;
  if (!type_of(table->dtype, x->dtype == XLA_FFI_DataType_BF16, &type) || type == INT4) {
    return error_of(frame, "a table of this type has no kernel");
  }
  ScoreWork work = {.w = {.type = type, .values = table->data, .rows = table->dims[0], .columns = D},
                    .height = attribute(frame, "rows")};
  if (type == INT8) work.w.scales = argument(frame, 2)->data;
  const float **inputs = room(TABLES, 3 * R * sizeof(void *));
  inputs_of(x, room(INPUTS, R * D * sizeof(float)), inputs);
  float **y = (float **)(inputs + 2 * R);
  work.rows = rows_of(x, inputs, result(frame, 0)->data, work.w.rows, inputs + R, y);
  int64_t count = work.rows.count ? stripes_of(work.w.rows, work.height) : 0;
  int64_t threads = num_threads(frame, bytes_of(type, work.w.rows * D));
  run_chunks(frame, threads, count, score_chunk, &work);
  return NULL;
}

#include "experts.h"

#include "attention.h"

#include "sampling.h"

XLA_FFI_Error *grok_multiply(XLA_FFI_CallFrame *frame) { return multiply(frame); }
XLA_FFI_Error *grok_score(XLA_FFI_CallFrame *frame) { return score(frame); }
XLA_FFI_Error *grok_experts(XLA_FFI_CallFrame *frame) { return experts(frame); }
XLA_FFI_Error *grok_attention(XLA_FFI_CallFrame *frame) { return attention(frame); }
XLA_FFI_Error *grok_argmax(XLA_FFI_CallFrame *frame) { return argmax(frame); }
XLA_FFI_Error *grok_logsumexp(XLA_FFI_CallFrame *frame) { return logsumexp(frame); }

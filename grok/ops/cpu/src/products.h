// Products of a few rows with matrices as they are stored: each weight is read once.
//
// A result is a sum of parts of the contracted axis, each summed in its order, whatever the number of
// rows, the stripe of columns or the thread: its bits depend on its row and its column alone.
#pragma once

#include "lanes.h"

#define PART_ROWS 128    // rows of a matrix that are summed by themselves
#define MAX_STRIPE 4096  // columns of sums
#define MAX_BLOCK 16     // vectors of a matrix that sums take at once

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// True of so few rows of x that threads share a matrix by its rows, which are read from end to end.
static bool is_streamed(enum type type, int64_t rows) {
  return rows == 1 || (rows == 2 && type <= BFLOAT16);
}

// A matrix (rows, columns) of floats, or of ints with bfloat16 scales (groups, columns).
typedef struct {
  enum type type;
  const void *values;
  const uint16_t *scales;
  int64_t rows, columns, groups;
} Matrix;

// sums[m][c] += x[m][d] * w[d][c], of `count` rows from `row` on, of the `V` vectors of columns from
// `column` on; sums[m] are those from `begin` on. `type`, `V`, `M` and `count` are constants where
// this is expanded.
INLINE void add_vectors(enum type type, int V, int M, int count, const Matrix *w,
                        const float *const *x, int64_t row, int64_t column, int64_t begin,
                        float *const *sums) {
  vfloat weights[MAX_BLOCK];
  int64_t first = row * w->columns + column, ahead = first + count * w->columns;
  UNROLL for (int k = 0; k < count; k++) {
    UNROLL for (int v = 0; v < V; v++) {
      weights[k * V + v] = weights_at(type, w->values, first + k * w->columns + v * LANES);
    }
    if (count == 1) continue;
    const char *next = address_of(type, w->values, ahead + k * w->columns);
    UNROLL for (int line = 0; line < bytes_of(type, V * LANES); line += 64) {
      __builtin_prefetch(next + line, 0, 2);  // into the second cache
    }
  }
  UNROLL for (int m = 0; m < M; m++) {
    float *at = sums[m] + column - begin;
    vfloat totals[8];
    UNROLL for (int v = 0; v < V; v++) totals[v] = load(at + v * LANES);
    UNROLL for (int k = 0; k < count; k++) {
      vfloat factor = (vfloat){0} + x[m][row + k];
      UNROLL for (int v = 0; v < V; v++) totals[v] += factor * weights[k * V + v];
    }
    UNROLL for (int v = 0; v < V; v++) store(at + v * LANES, totals[v]);
  }
}

// The same of columns from `begin` to before `end`.
INLINE void add_rows(enum type type, int V, int M, int count, const Matrix *w,
                     const float *const *x, int64_t row, int64_t begin, int64_t end,
                     float *const *sums) {
  int64_t column = begin;
  for (; column + V * LANES <= end; column += V * LANES) {
    add_vectors(type, V, M, count, w, x, row, column, begin, sums);
  }
  for (; column + LANES <= end; column += LANES) {
    add_vectors(type, 1, M, count, w, x, row, column, begin, sums);
  }
  for (; column < end; column++) {
    for (int m = 0; m < M; m++) {
      float sum = sums[m][column - begin];
      for (int k = 0; k < count; k++) {
        float weight = weight_at(type, w->values, (row + k) * w->columns + column);
        sum = multiply_add(x[m][row + k], weight, sum);
      }
      sums[m][column - begin] = sum;
    }
  }
}

// The same of any number of rows of x, eight, four, two and one at a time.
INLINE void add_rows_of_all(enum type type, int V, int count, const Matrix *w,
                            const float *const *x, int64_t rows, int64_t row, int64_t begin,
                            int64_t end, float *const *sums) {
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) add_rows(type, V, 8, count, w, x + m, row, begin, end, sums + m);
  if (rows - m >= 4) {
    add_rows(type, V, 4, count, w, x + m, row, begin, end, sums + m);
    m += 4;
  }
  if (rows - m >= 2) {
    add_rows(type, V, 2, count, w, x + m, row, begin, end, sums + m);
    m += 2;
  }
  if (rows - m >= 1) add_rows(type, V, 1, count, w, x + m, row, begin, end, sums + m);
}

// `V` vectors of `count` rows at a time fill half of the registers.
INLINE void add_all_rows(enum type type, int V, int count, const Matrix *w, const float *const *x,
                         int64_t rows, int64_t first, int64_t last, int64_t begin, int64_t end,
                         float *const *sums) {
  int64_t row = first;
  for (; row + count <= last; row += count) {
    add_rows_of_all(type, V, count, w, x, rows, row, begin, end, sums);
  }
  for (; row < last; row++) add_rows_of_all(type, V, 1, w, x, rows, row, begin, end, sums);
}

// A row at a time, of one row of x or two, as the processor's own prefetching expects.
INLINE void stream_rows(enum type type, const Matrix *w, const float *const *x, int64_t rows,
                        int64_t first, int64_t last, int64_t begin, int64_t end,
                        float *const *sums) {
  for (int64_t row = first; row < last; row++) {
    if (rows == 1) {
      add_rows(type, 8, 1, 1, w, x, row, begin, end, sums);
    } else {
      add_rows(type, 8, 2, 1, w, x, row, begin, end, sums);
    }
  }
}

static void add_group(const Matrix *w, const float *const *x, int64_t rows, int64_t first,
                      int64_t last, int64_t begin, int64_t end, float *const *sums) {
  // Of float32 eight rows at a time, fetched ahead, are faster still.
  if (w->type > ROUNDED && is_streamed(w->type, rows)) {
    switch (w->type) {
      case BFLOAT16: stream_rows(BFLOAT16, w, x, rows, first, last, begin, end, sums); return;
      case INT8: stream_rows(INT8, w, x, 1, first, last, begin, end, sums); return;
      default: stream_rows(INT4, w, x, 1, first, last, begin, end, sums); return;
    }
  }
  switch (w->type) {
    case FLOAT32: add_all_rows(FLOAT32, 2, 8, w, x, rows, first, last, begin, end, sums); return;
    case ROUNDED: add_all_rows(ROUNDED, 2, 8, w, x, rows, first, last, begin, end, sums); return;
    case BFLOAT16: add_all_rows(BFLOAT16, 2, 8, w, x, rows, first, last, begin, end, sums); return;
    case INT8: add_all_rows(INT8, 4, 4, w, x, rows, first, last, begin, end, sums); return;
    default: add_all_rows(INT4, 4, 4, w, x, rows, first, last, begin, end, sums);
  }
}

// sums[m][c] *= the scale of a group of rows, of columns from `begin` to before `end`.
static void scale_columns(const Matrix *w, int64_t group, int64_t rows, int64_t begin, int64_t end,
                          float *const *sums) {
  const uint16_t *scales = w->scales + group * w->columns + begin;
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t c = 0; c < end - begin; c++) sums[m][c] *= from_bfloat16(scales[c]);
  }
}

// sums[m][c] = x[m] w of the matrix's rows from `first` to before `last` and its columns from `begin`
// to before `end`, sums[m] pointing at `begin`. Of ints in several groups the sum of each is
// multiplied by its scale; `spare` has room for as many sums.
static void multiply_part(const Matrix *w, const float *const *x, int64_t rows, int64_t first,
                          int64_t last, int64_t begin, int64_t end, float *const *sums,
                          float *const *spare) {
  int64_t width = end - begin, length = w->groups > 1 ? w->rows / w->groups : w->rows;
  float *const *into = sums;
  while (first < last) {
    int64_t group = first / length, next = smaller((group + 1) * length, last);
    for (int64_t m = 0; m < rows; m++) memset(into[m], 0, width * sizeof(float));
    add_group(w, x, rows, first, next, begin, end, into);
    if (w->groups > 1) scale_columns(w, group, rows, begin, end, into);
    for (int64_t m = 0; into == spare && m < rows; m++) {
      for (int64_t c = 0; c < width; c++) sums[m][c] += spare[m][c];
    }
    first = next;
    into = spare;
  }
}

// y[m][n] = <x[m], w[n]> of N rows of a matrix from `row` on.
INLINE void dot_rows(enum type type, int M, int N, const Matrix *w, const float *const *x,
                     int64_t row, float *const *y) {
  int64_t length = w->columns, first = row * length, d = 0;
  vfloat sums[8][2];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int n = 0; n < N; n++) sums[m][n] = (vfloat){0};
  }
  for (; d + LANES <= length; d += LANES) {
    vfloat weights[2];
    UNROLL for (int n = 0; n < N; n++) {
      weights[n] = weights_at(type, w->values, first + n * length + d);
      if (N > 1) __builtin_prefetch(address_of(type, w->values, first + (n + N) * length + d));
    }
    UNROLL for (int m = 0; m < M; m++) {
      vfloat inputs = load(x[m] + d);
      UNROLL for (int n = 0; n < N; n++) sums[m][n] += inputs * weights[n];
    }
  }
  for (int n = 0; n < N; n++) {
    for (int m = 0; m < M; m++) {
      float sum = sum_of(sums[m][n]);
      for (int64_t rest = d; rest < length; rest++) {
        sum += x[m][rest] * weight_at(type, w->values, first + n * length + rest);
      }
      y[m][row + n] = sum;
    }
  }
}

INLINE void dot_rows_of_all(enum type type, int N, const Matrix *w, const float *const *x,
                            int64_t rows, int64_t row, float *const *y) {
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) dot_rows(type, 8, N, w, x + m, row, y + m);
  if (rows - m >= 4) {
    dot_rows(type, 4, N, w, x + m, row, y + m);
    m += 4;
  }
  if (rows - m >= 2) {
    dot_rows(type, 2, N, w, x + m, row, y + m);
    m += 2;
  }
  if (rows - m >= 1) dot_rows(type, 1, N, w, x + m, row, y + m);
}

INLINE void dot_block_of(enum type type, const Matrix *w, const float *const *x, int64_t rows,
                         int64_t begin, int64_t end, float *const *y) {
  int64_t row = begin;
  if (!is_streamed(type, rows)) {
    for (; row + 2 <= end; row += 2) dot_rows_of_all(type, 2, w, x, rows, row, y);
  }
  for (; row < end; row++) dot_rows_of_all(type, 1, w, x, rows, row, y);
}

// y[m][n] = <x[m], w[n]> of the matrix's rows from `begin` to before `end`.
static void dot_block(const Matrix *w, const float *const *x, int64_t rows, int64_t begin,
                      int64_t end, float *const *y) {
  switch (w->type) {
    case FLOAT32: dot_block_of(FLOAT32, w, x, rows, begin, end, y); return;
    case ROUNDED: dot_block_of(ROUNDED, w, x, rows, begin, end, y); return;
    case BFLOAT16: dot_block_of(BFLOAT16, w, x, rows, begin, end, y); return;
    default: dot_block_of(INT8, w, x, rows, begin, end, y);
  }
}

// Products of a few rows with several matrices, whose weights all threads read together.
#pragma once

// A matrix, rows of x, and where their products go. A chunk is a stripe of columns or, where the
// matrix is streamed, a part of its rows.
typedef struct {
  Matrix w;
  const float *const *x;
  float *const *y;
  int64_t rows, width, stripes, parts;
  int64_t first;      // of its chunks among those of all products
  float *sums;        // (parts, rows, columns), where there are several
  atomic_llong left;  // parts that are not summed yet
} Product;

typedef struct {
  Product *products;
  int64_t count;
} Products;

static int64_t stripes_of(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

// Columns of a stripe: 2 KiB of a row, so that memory is read in long pieces, or half of that where
// `matrices` have too few such stripes to keep the threads busy to the end.
static int64_t stripe_width(enum type type, int64_t columns, int64_t matrices, int64_t threads) {
  int64_t width = 2048 / (type == INT4 ? 1 : bytes_of(type, 1));
  return matrices * stripes_of(columns, width) < 2 * threads ? width / 2 : width;
}

// Addresses of `rows` rows of `width` floats of this thread.
static float **sums_of(int which, int64_t rows, int64_t width) {
  float **addresses = room(which, rows * (sizeof(float *) + width * sizeof(float)));
  float *sums = (float *)(addresses + rows);
  for (int64_t m = 0; m < rows; m++) addresses[m] = sums + m * width;
  return addresses;
}

static void add_to(float *restrict sums, const float *restrict more, int64_t count) {
  for (int64_t i = 0; i < count; i++) sums[i] += more[i];
}

// All parts of a stripe, one after the other.
static void multiply_stripe(const Product *p, int64_t begin, int64_t end) {
  int64_t rows = p->rows, width = end - begin;
  float **spare = sums_of(SPARE, 3 * rows, width);
  float **part = spare + rows, **y = spare + 2 * rows;
  for (int64_t m = 0; m < rows; m++) y[m] = p->y[m] + begin;
  for (int64_t first = 0; first < p->w.rows; first += PART_ROWS) {
    int64_t last = smaller(first + PART_ROWS, p->w.rows);
    multiply_part(&p->w, p->x, rows, first, last, begin, end, first ? part : y, spare);
    for (int64_t m = 0; first && m < rows; m++) add_to(y[m], part[m], width);
  }
  if (p->w.scales && p->w.groups == 1) scale_columns(&p->w, 0, rows, begin, end, y);
}

// Adds the parts of a product that was streamed.
static void add_parts(const Product *p) {
  int64_t columns = p->w.columns;
  for (int64_t m = 0; p->sums && m < p->rows; m++) {
    memcpy(p->y[m], p->sums + m * columns, columns * sizeof(float));
    for (int64_t part = 1; part < p->parts; part++) {
      add_to(p->y[m], p->sums + (part * p->rows + m) * columns, columns);
    }
  }
  if (p->w.scales && p->w.groups == 1) scale_columns(&p->w, 0, p->rows, 0, columns, p->y);
}

static void product_chunk(void *data, int64_t index) {
  const Products *all = data;
  Product *p = all->products + all->count - 1;
  while (index < p->first) p--;
  index -= p->first;
  int64_t part = index / p->stripes, begin = index % p->stripes * p->width;
  int64_t end = smaller(begin + p->width, p->w.columns);
  if (!is_streamed(p->w.type, p->rows)) {
    multiply_stripe(p, begin, end);
    return;
  }
  float **spare = sums_of(SPARE, 2 * p->rows, p->width), **sums = spare + p->rows;
  for (int64_t m = 0; m < p->rows; m++) {
    float *y = p->parts > 1 ? p->sums + (part * p->rows + m) * p->w.columns : p->y[m];
    sums[m] = y + begin;
  }
  int64_t first = part * PART_ROWS, last = smaller(first + PART_ROWS, p->w.rows);
  multiply_part(&p->w, p->x, p->rows, first, last, begin, end, sums, spare);
  if (atomic_fetch_sub(&p->left, 1) == 1) add_parts(p);
}

// y[m] = x[m] w of all products, of which the fields up to `rows` are set. Those of no rows are left
// out.
static void run_products(const XLA_FFI_CallFrame *frame, Product *products, int64_t count) {
  int64_t chunks = 0, bytes = 0, floats = 0, all_threads = num_threads(frame, INT64_MAX);
  for (Product *p = products; p < products + count; p++) {
    int64_t columns = p->w.columns;
    bool streamed = is_streamed(p->w.type, p->rows);
    p->width = streamed ? smaller(columns, MAX_STRIPE)
                        : stripe_width(p->w.type, columns, count, all_threads);
    p->stripes = stripes_of(columns, p->width);
    p->parts = streamed ? stripes_of(p->w.rows, PART_ROWS) : 1;
    p->first = chunks;
    if (p->rows) {
      chunks += p->stripes * p->parts;
      bytes += bytes_of(p->w.type, p->w.rows * columns);
    }
    p->left = p->stripes * p->parts;
    if (p->parts > 1) floats += p->parts * p->rows * columns;
  }
  float *sums = room(PARTS, floats * sizeof(float));
  for (Product *p = products; p < products + count; p++) {
    p->sums = p->parts > 1 ? sums : NULL;
    if (p->sums) sums += p->parts * p->rows * p->w.columns;
  }
  Products all = {products, count};
  run_chunks(frame, num_threads(frame, bytes), chunks, product_chunk, &all);
}

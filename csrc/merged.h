// What is written: merged tensors, each rounded once, and how large they get. Included by every variant, within its
// namespace.

// The largest magnitude by its bits: those of Inf and NaN are larger than any number's, and compare as integers do.
static inline uint32_t magnitude_bits(float value) { return bits_of(value) & 0x7fffffffu; }
static inline uint64_t magnitude_bits(double value) {
  uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffffffffffffu;
}
template <typename T>
struct Largest {
  decltype(magnitude_bits(T())) bits = 0;
  void see(const T *values, int64_t count) {
    auto largest = bits;
    for (int64_t k = 0; k < count; ++k) {
      const auto one = magnitude_bits(values[k]);
      largest = one > largest ? one : largest;
    }
    bits = largest;
  }
  double value() const {
    T found;
    __builtin_memcpy(&found, &bits, sizeof found);
    return (double)found;
  }
};

template <typename T>
static int32_t combine(int64_t count, const r2m_matrix *inputs, const void *coefficients, int64_t stride, int64_t rows,
                       int64_t columns, const r2m_matrix *low_rank, const r2m_matrix *out, double *largest) {
  Workspace chunks(4 * CHUNK * (int64_t)sizeof(T));
  if (!chunks.memory) return R2M_NO_MEMORY;
  T *total = (T *)chunks.memory, *scratch = total + CHUNK;
  Largest<T> seen;
  for (int64_t row = 0; row < rows; ++row) {
    const T *factors = (const T *)coefficients + row * stride;
    for (int64_t column = 0; column < columns; column += CHUNK) {
      const int64_t length = smaller(CHUNK, columns - column);
      const T *base = read(inputs[0], row, column, length, scratch);
      memcpy(total, base, (size_t)length * sizeof(T));
      for (int64_t j = 0; j < count; ++j) {
        const T *expert = read(inputs[1 + j], row, column, length, scratch + CHUNK);
        const T factor = factors[j];
        for (int64_t k = 0; k < length; ++k) total[k] += factor * (expert[k] - base[k]);
      }
      if (low_rank) {
        const T *term = (const T *)address(*low_rank, row, column);
        for (int64_t k = 0; k < length; ++k) total[k] += term[k];
      }
      seen.see(total, length);
      write(total, *out, row, column, length);
    }
  }
  *largest = seen.value();
  return R2M_OK;
}

// In double, and without a base: θ0 plus rounded differences could turn a variance negative.
template <typename T>
static int32_t mean(int64_t count, const r2m_matrix *experts, const double *weights, int64_t first, int64_t last,
                    const r2m_matrix *out, double *largest) {
  double sum[CHUNK], scratch[CHUNK];
  T total[CHUNK];
  Largest<T> seen;
  for (int64_t column = first; column < last; column += CHUNK) {
    const int64_t length = smaller(CHUNK, last - column);
    for (int64_t k = 0; k < length; ++k) sum[k] = 0;
    for (int64_t j = 0; j < count; ++j) {
      const double *expert = read(experts[j], 0, column, length, scratch);
      for (int64_t k = 0; k < length; ++k) sum[k] += weights[j] * expert[k];
    }
    for (int64_t k = 0; k < length; ++k) total[k] = (T)sum[k];
    seen.see(total, length);
    write(sum, *out, 0, column, length);
  }
  *largest = seen.value();
  return R2M_OK;
}

// Σ τ_j² of every column, and of the merged change, which takes the place of what was merged.
template <typename T>
static int32_t column_squares(int64_t count, const r2m_matrix *inputs, int64_t rows, int64_t columns,
                              const r2m_matrix *merged, double *squares) {
  Workspace taus((count + 2) * CHUNK * (int64_t)sizeof(T));
  if (!taus.memory) return R2M_NO_MEMORY;
  T *tau = (T *)taus.memory;
  memset(squares, 0, (size_t)((count + 1) * columns) * sizeof(double));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += CHUNK) {
      const int64_t length = smaller(CHUNK, columns - column);
      const T *base = task_vectors(count, inputs, row, column, length, tau);
      T *R2M_RESTRICT change = (T *)address(*merged, row, column);
      for (int64_t k = 0; k < length; ++k) change[k] -= base[k];
      for (int64_t j = 0; j <= count; ++j) {
        const T *R2M_RESTRICT of = j < count ? tau + j * CHUNK : change;
        double *R2M_RESTRICT sums = squares + j * columns + column;
        for (int64_t k = 0; k < length; ++k) sums[k] += (double)of[k] * (double)of[k];
      }
    }
  return R2M_OK;
}

template <typename T>
static int32_t scale_columns(const r2m_matrix *base, const r2m_matrix *change, const void *factors, int64_t rows,
                             int64_t columns, const r2m_matrix *out, double *largest) {
  T scratch[CHUNK], total[CHUNK];
  Largest<T> seen;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += CHUNK) {
      const int64_t length = smaller(CHUNK, columns - column);
      const T *theta = read(*base, row, column, length, scratch), *factor = (const T *)factors + column;
      const T *moved = (const T *)address(*change, row, column);
      for (int64_t k = 0; k < length; ++k) total[k] = theta[k] + factor[k] * moved[k];
      seen.see(total, length);
      write(total, *out, row, column, length);
    }
  *largest = seen.value();
  return R2M_OK;
}

template <typename T>
static int32_t weighted_sum(int64_t count, const r2m_matrix *inputs, const void *coefficients, int64_t rows,
                            int64_t columns, const r2m_matrix *out) {
  Workspace taus((count + 3) * CHUNK * (int64_t)sizeof(T));
  if (!taus.memory) return R2M_NO_MEMORY;
  T *tau = (T *)taus.memory, *x = tau + (count + 2) * CHUNK;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += CHUNK) {
      const int64_t length = smaller(CHUNK, columns - column);
      task_vectors(count, inputs, row, column, length, tau);
      mix(count, (const T *)coefficients, tau, length, x);
      write(x, *out, row, column, length);
    }
  return R2M_OK;
}

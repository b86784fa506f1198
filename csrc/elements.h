// TIES and DARE, element by element. Included by every variant, within its namespace.

// |τ| as float has 32 bits: counts go by their upper 16, or by the lower 16 of those whose upper ones are `upper`.
template <typename T>
static int32_t count_magnitudes(int64_t count, const r2m_matrix *inputs, int64_t first, int64_t last,
                                const int64_t *upper, int64_t *counts) {
  Workspace taus((count + 2) * CHUNK * (int64_t)sizeof(T));
  if (!taus.memory) return R2M_NO_MEMORY;
  T *tau = (T *)taus.memory;
  for (int64_t column = first; column < last; column += CHUNK) {
    const int64_t length = smaller(CHUNK, last - column);
    task_vectors(count, inputs, 0, column, length, tau);
    for (int64_t j = 0; j < count; ++j) {
      int64_t *R2M_RESTRICT of_expert = counts + j * R2M_MAGNITUDES;
      uint32_t bits[CHUNK];
      for (int64_t k = 0; k < length; ++k) bits[k] = magnitude_bits((float)tau[j * CHUNK + k]);
      if (upper) {
        for (int64_t k = 0; k < length; ++k)
          if (bits[k] >> 16 == (uint32_t)upper[j]) ++of_expert[bits[k] & 0xffffu];
      } else {
        for (int64_t k = 0; k < length; ++k) ++of_expert[bits[k] >> 16];
      }
    }
  }
  return R2M_OK;
}

// What TIES and DARE leave of a chunk's task vectors, and the sum of it that is added to the base.
template <typename T>
static void elect(int64_t count, const T *weights, const float *thresholds, T *R2M_RESTRICT taus, int64_t length,
                  T *R2M_RESTRICT sum, T *R2M_RESTRICT share) {
  for (int64_t k = 0; k < length; ++k) sum[k] = 0;
  for (int64_t j = 0; j < count; ++j) {
    T *R2M_RESTRICT tau = taus + j * CHUNK;
    const float smallest = thresholds[j];
    for (int64_t k = 0; k < length; ++k) {
      tau[k] = __builtin_fabsf((float)tau[k]) >= smallest ? tau[k] : (T)0 * tau[k];  // NaN and Inf stay to be seen
      sum[k] += weights[j] * tau[k];
    }
  }
  T merged[CHUNK];
  for (int64_t k = 0; k < length; ++k) merged[k] = share[k] = 0;
  for (int64_t j = 0; j < count; ++j) {
    const T *R2M_RESTRICT tau = taus + j * CHUNK;
    for (int64_t k = 0; k < length; ++k) {
      const T agrees = tau[k] * sum[k] > 0 ? weights[j] : (T)0;
      share[k] += agrees;
      merged[k] += agrees * tau[k];
    }
  }
  for (int64_t k = 0; k < length; ++k) sum[k] = merged[k] / (share[k] > 0 ? share[k] : (T)1);
}

// The finalizer of SplitMix64 (Steele, Lea & Flood 2014) on the element-th number of the sequence that starts at key.
static inline uint64_t hash_of(uint64_t key, uint64_t element) {
  uint64_t z = key + 0x9E3779B97F4A7C15u * (element + 1);
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

template <typename T>
static int32_t combine_ties(int64_t count, const r2m_matrix *inputs, const void *weights, const float *thresholds,
                            double scale, int64_t first, int64_t last, const r2m_matrix *out, double *largest) {
  Workspace chunks((count + 5) * CHUNK * (int64_t)sizeof(T));
  if (!chunks.memory) return R2M_NO_MEMORY;
  T *tau = (T *)chunks.memory, *sum = tau + (count + 2) * CHUNK, *share = sum + CHUNK;
  Largest<T> seen;
  for (int64_t column = first; column < last; column += CHUNK) {
    const int64_t length = smaller(CHUNK, last - column);
    const T *base = task_vectors(count, inputs, 0, column, length, tau);
    elect(count, (const T *)weights, thresholds, tau, length, sum, share);
    for (int64_t k = 0; k < length; ++k) sum[k] = base[k] + (T)scale * sum[k];
    seen.see(sum, length);
    write(sum, *out, 0, column, length);
  }
  *largest = seen.value();
  return R2M_OK;
}

template <typename T>
static int32_t combine_dare(int64_t count, const r2m_matrix *inputs, const void *weights, const int64_t *keys,
                            double scale, double density, int64_t place, int64_t first, int64_t last,
                            const r2m_matrix *out, double *largest) {
  Workspace chunks((count + 3) * CHUNK * (int64_t)sizeof(T));
  if (!chunks.memory) return R2M_NO_MEMORY;
  T *tau = (T *)chunks.memory, *total = tau + (count + 2) * CHUNK;
  const uint64_t limit = (uint64_t)(density * 0x1p32);
  Largest<T> seen;
  for (int64_t column = first; column < last; column += CHUNK) {
    const int64_t length = smaller(CHUNK, last - column);
    const T *base = task_vectors(count, inputs, 0, column, length, tau);
    for (int64_t k = 0; k < length; ++k) total[k] = 0;
    for (int64_t j = 0; j < count; ++j) {
      const T weight = ((const T *)weights)[j], *R2M_RESTRICT of_expert = tau + j * CHUNK;
      for (int64_t k = 0; k < length; ++k) {
        const bool kept = hash_of((uint64_t)keys[j], (uint64_t)(place + column + k)) >> 32 < limit;
        total[k] += weight * (kept ? of_expert[k] : (T)0 * of_expert[k]);
      }
    }
    for (int64_t k = 0; k < length; ++k) total[k] = base[k] + (T)scale * (total[k] / (T)density);
    seen.see(total, length);
    write(total, *out, 0, column, length);
  }
  *largest = seen.value();
  return R2M_OK;
}

// TIES and DARE, element by element. Included by every variant, within its namespace.

template <typename T>
static inline uint16_t upper_half(T tau) {
  return (uint16_t)(magnitude_bits((float)tau) >> 16);
}

// Four to a load: that, and an instruction for each, took a third off.
static void count_upper(const uint16_t *halves, int64_t length, int64_t *counts) {
  int64_t k = 0;
  for (; k + 4 <= length; k += 4) {
    uint64_t four;
    memcpy(&four, halves + k, sizeof four);
    ++counts[four & 0xffffu];
    ++counts[four >> 16 & 0xffffu];
    ++counts[four >> 32 & 0xffffu];
    ++counts[four >> 48];
  }
  for (; k < length; ++k) ++counts[halves[k]];
}

// Of few elements the upper half is the wanted one: eight at a time are passed over.
template <typename T>
static void count_lower(const T *tau, const uint8_t *found, int64_t length, int64_t *counts) {
  constexpr int64_t AT_ONCE = sizeof(uint64_t);
  for (int64_t start = 0; start < length; start += AT_ONCE) {
    uint64_t any;
    memcpy(&any, found + start, sizeof any);
    if (any)
      for (int64_t k = start; k < start + AT_ONCE; ++k)
        if (found[k]) ++counts[magnitude_bits((float)tau[k]) & 0xffffu];
  }
}

// |τ| as float has 32 bits: counts go by their upper 16, or by the lower 16 of those whose upper ones are `upper`.
// Of all experts before any is counted: what a whole register has just stored is slow to load in pieces.
template <typename T>
static int32_t count_magnitudes(int64_t count, const r2m_matrix *inputs, int64_t first, int64_t last,
                                const int64_t *upper, int64_t *counts) {
  Workspace taus((count + 2) * CHUNK * (int64_t)sizeof(T)), keys(count * CHUNK * (int64_t)sizeof(uint16_t));
  if (!taus.memory || !keys.memory) return R2M_NO_MEMORY;
  T *tau = (T *)taus.memory;
  uint16_t *R2M_RESTRICT half = (uint16_t *)keys.memory;
  uint8_t *R2M_RESTRICT found = (uint8_t *)keys.memory;
  for (int64_t column = first; column < last; column += CHUNK) {
    const int64_t length = smaller(CHUNK, last - column);
    task_vectors(count, inputs, 0, column, length, tau);
    for (int64_t j = 0; j < count; ++j) {
      const T *of = tau + j * CHUNK;
      if (upper) {
        const uint16_t wanted = (uint16_t)upper[j];
        for (int64_t k = 0; k < length; ++k) found[j * CHUNK + k] = upper_half(of[k]) == wanted;
        memset(found + j * CHUNK + length, 0, (size_t)(CHUNK - length));
      } else {
        for (int64_t k = 0; k < length; ++k) half[j * CHUNK + k] = upper_half(of[k]);
      }
    }
    // Counting waits for its counters, and would then wait for memory too.
    fetch(inputs[0], 0, column + 2 * CHUNK, CHUNK);
    for (int64_t j = 0; j < count; ++j) {
      fetch(inputs[1 + j], 0, column + 2 * CHUNK, CHUNK);
      int64_t *R2M_RESTRICT of_expert = counts + j * R2M_MAGNITUDES;
      if (upper) {
        count_lower(tau + j * CHUNK, found + j * CHUNK, length, of_expert);
      } else {
        count_upper(half + j * CHUNK, length, of_expert);
      }
    }
  }
  return R2M_OK;
}

// |τ| as float, in τ's type.
static inline Vector<float>::type magnitudes(const Vector<float>::type &tau) { return tau < 0 ? -tau : tau; }
static inline Vector<double>::type magnitudes(const Vector<double>::type &tau) {
  typedef float Rounded __attribute__((vector_size(sizeof(float) * LANES<double>)));
  return __builtin_convertvector(__builtin_convertvector(tau < 0 ? -tau : tau, Rounded), Vector<double>::type);
}

// What TIES leaves of a chunk's task vectors, to be added to the base; beyond `length` it is whatever came out.
template <typename T>
static void elect(int64_t count, const T *weights, const float *thresholds, T *R2M_RESTRICT taus, int64_t length,
                  T *R2M_RESTRICT elected) {
  typedef typename Vector<T>::type Register;
  for (int64_t k = 0; k < length; k += LANES<T>) {
    const Register none = {};
    Register sum = none, share = none, merged = none;
    for (int64_t j = 0; j < count; ++j) {
      const Register tau = Vector<T>::load(taus + j * CHUNK + k);
      const Register kept = magnitudes(tau) >= (T)thresholds[j] ? tau : 0 * tau;  // NaN and Inf stay to be seen
      Vector<T>::store(kept, taus + j * CHUNK + k);
      sum += weights[j] * kept;
    }
    for (int64_t j = 0; j < count; ++j) {
      const Register tau = Vector<T>::load(taus + j * CHUNK + k);
      const Register agrees = tau * sum > 0 ? none + weights[j] : none;
      share += agrees;
      merged += agrees * tau;
    }
    Vector<T>::store(merged / (share > 0 ? share : none + 1), elected + k);
  }
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
  Workspace chunks((count + 3) * CHUNK * (int64_t)sizeof(T));
  if (!chunks.memory) return R2M_NO_MEMORY;
  T *tau = (T *)chunks.memory, *sum = tau + (count + 2) * CHUNK;
  Largest<T> seen;
  for (int64_t column = first; column < last; column += CHUNK) {
    const int64_t length = smaller(CHUNK, last - column);
    const T *base = task_vectors(count, inputs, 0, column, length, tau);
    elect(count, (const T *)weights, thresholds, tau, length, sum);
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

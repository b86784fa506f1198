// Between storage and compute types, a chunk at a time. Included once by every variant, within its namespace.
//
// Loops are plain so that the compiler vectorizes them for the variant's instructions; only float16, which it does not
// know, has intrinsics.

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float float_of_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  // The exponent's bias is 112 smaller than a float's; a product corrects it for subnormal numbers too.
  float value = float_of(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00u) value = float_of(magnitude << 13 | 0x7f800000u);
  return float_of(bits_of(value) | (half & 0x8000u) << 16);
}

static inline uint16_t half_of_float(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  const float magnitude = float_of(bits_of(value) & 0x7fffffffu);
  uint32_t half;
  if (magnitude != magnitude) {
    half = 0x7e00u;
  } else if (magnitude >= 65520.0f) {  // halfway between the largest float16 and the next power of two
    half = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    half = bits_of(magnitude + 0.5f) - bits_of(0.5f);  // 0.5 has the spacing of float16's subnormal numbers
  } else {
    const uint32_t bits = bits_of(magnitude);
    half = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
  }
  return (uint16_t)(sign | half);
}

static inline uint16_t bfloat_of_float(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Rounded to odd: rounding it again to fewer bits is as good as rounding `value` once.
static inline float odd_float_of(double value) {
  const float nearest = (float)value;
  if ((double)nearest == value || value != value || __builtin_isinf(nearest)) return nearest;
  const bool away = __builtin_fabs((double)nearest) > __builtin_fabs(value);
  return float_of((bits_of(nearest) - (away ? 1u : 0u)) | 1u);
}

template <typename T>
static void widen_halves(const uint16_t *source, int64_t count, T *out) {
  int64_t k = 0;
#if defined(__F16C__)
  if (sizeof(T) == sizeof(float)) {
    for (; k + 8 <= count; k += 8)
      _mm256_storeu_ps((float *)out + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(source + k))));
  }
#elif defined(R2M_NEON_HALVES)
  if (sizeof(T) == sizeof(float)) {
    for (; k + 4 <= count; k += 4)
      vst1q_f32((float *)out + k, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source + k))));
  }
#endif
  for (; k < count; ++k) out[k] = (T)float_of_half(source[k]);
}

static void narrow_to_halves(const float *source, int64_t count, uint16_t *out) {
  int64_t k = 0;
#if defined(__F16C__)
  for (; k + 8 <= count; k += 8)
    _mm_storeu_si128((__m128i *)(out + k), _mm256_cvtps_ph(_mm256_loadu_ps(source + k), _MM_FROUND_TO_NEAREST_INT));
#elif defined(R2M_NEON_HALVES)
  for (; k + 4 <= count; k += 4) vst1_u16(out + k, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(source + k))));
#endif
  for (; k < count; ++k) out[k] = half_of_float(source[k]);
}

static void narrow_to_halves(const double *source, int64_t count, uint16_t *out) {
  for (int64_t k = 0; k < count; ++k) out[k] = half_of_float(odd_float_of(source[k]));
}

static void narrow_to_bfloats(const float *R2M_RESTRICT source, int64_t count, uint16_t *R2M_RESTRICT out) {
  for (int64_t k = 0; k < count; ++k) out[k] = bfloat_of_float(source[k]);
}

static void narrow_to_bfloats(const double *source, int64_t count, uint16_t *out) {
  for (int64_t k = 0; k < count; ++k) out[k] = bfloat_of_float(odd_float_of(source[k]));
}

static inline int64_t element_bytes(int64_t dtype) { return dtype == R2M_FLOAT64 ? 8 : dtype == R2M_FLOAT32 ? 4 : 2; }

static inline char *address(const r2m_matrix &matrix, int64_t row, int64_t column) {
  return (char *)matrix.data + (row * matrix.row_stride + column) * element_bytes(matrix.dtype);
}

// `count` elements from (row, column) on in the compute type: where they lie, or converted into `scratch`.
template <typename T>
static const T *read(const r2m_matrix &matrix, int64_t row, int64_t column, int64_t count, T *R2M_RESTRICT scratch) {
  const char *source = address(matrix, row, column);
  const bool same = matrix.dtype == (sizeof(T) == sizeof(double) ? R2M_FLOAT64 : R2M_FLOAT32);
  if (same) return (const T *)source;
  if (matrix.dtype == R2M_BFLOAT16) {
    for (int64_t k = 0; k < count; ++k) scratch[k] = (T)float_of((uint32_t)((const uint16_t *)source)[k] << 16);
  } else if (matrix.dtype == R2M_FLOAT16) {
    widen_halves((const uint16_t *)source, count, scratch);
  } else if (matrix.dtype == R2M_FLOAT32) {
    for (int64_t k = 0; k < count; ++k) scratch[k] = (T)((const float *)source)[k];
  } else {
    for (int64_t k = 0; k < count; ++k) scratch[k] = (T)((const double *)source)[k];
  }
  return scratch;
}

// The opposite: `count` numbers to (row, column), rounded once.
template <typename T>
static void write(const T *R2M_RESTRICT source, const r2m_matrix &matrix, int64_t row, int64_t column, int64_t count) {
  char *target = address(matrix, row, column);
  if (matrix.dtype == R2M_BFLOAT16) {
    narrow_to_bfloats(source, count, (uint16_t *)target);
  } else if (matrix.dtype == R2M_FLOAT16) {
    narrow_to_halves(source, count, (uint16_t *)target);
  } else if (matrix.dtype == R2M_FLOAT32) {
    for (int64_t k = 0; k < count; ++k) ((float *)target)[k] = (float)source[k];
  } else {
    for (int64_t k = 0; k < count; ++k) ((double *)target)[k] = (double)source[k];
  }
}

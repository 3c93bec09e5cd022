#include "channels.h"

#include <algorithm>

#include <c10/util/bit_cast.h>

// GCC on x86-64 compiles each loop for three instruction sets and chooses at load time; elsewhere the compiler's own
// target serves.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PROJECTS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define PROJECTS_INLINE __attribute__((always_inline)) inline
#else
#define PROJECTS_CLONES
#define PROJECTS_INLINE inline
#endif
#define PROJECTS_RESTRICT __restrict

namespace projects {
namespace {

PROJECTS_INLINE double widen(double value) {
  return value;
}
PROJECTS_INLINE float widen(float value) {
  return value;
}
PROJECTS_INLINE float widen(c10::BFloat16 value) {
  return value;
}
// c10's own conversion branches, which the loops below cannot be vectorised over. This one shifts exponent and mantissa
// into place, corrects the exponent's bias by a multiplication (exact, subnormal numbers included), and sets the exponent
// of infinity and NaN.
PROJECTS_INLINE float widen(c10::Half value) {
  const uint32_t magnitude = (value.x & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const uint32_t sign = (value.x & 0x8000u) << 16;
  return c10::bit_cast<float>(c10::bit_cast<uint32_t>(c10::bit_cast<float>(magnitude) * 0x1p112f) | special | sign);
}

// Four taps at a time, so that the sum is loaded and stored once for four pixels.
template <typename map_t, typename T>
PROJECTS_INLINE void gather_loop(T* bins, const map_t* map, const Taps<T>& taps, int64_t channels) {
  for (int64_t b = 0; b < taps.bins(); ++b) {
    T* PROJECTS_RESTRICT sum = bins + b * channels;
    std::fill(sum, sum + channels, T(0));
    const int64_t end = taps.begin[b + 1];
    int64_t k = taps.begin[b];
    for (; k + 4 <= end; k += 4) {
      const map_t *p0 = map + taps.offset[k], *p1 = map + taps.offset[k + 1];
      const map_t *p2 = map + taps.offset[k + 2], *p3 = map + taps.offset[k + 3];
      const T w0 = taps.weight[k], w1 = taps.weight[k + 1], w2 = taps.weight[k + 2], w3 = taps.weight[k + 3];
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += w0 * widen(p0[c]) + w1 * widen(p1[c]) + w2 * widen(p2[c]) +
            w3 * widen(p3[c]);
      }
    }
    for (; k < end; ++k) {
      const map_t* pixel = map + taps.offset[k];
      const T weight = taps.weight[k];
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += weight * widen(pixel[c]);
      }
    }
  }
}

template <typename T>
PROJECTS_INLINE void scatter_loop(T* map, const T* bins, const Taps<T>& taps, int64_t channels) {
  for (int64_t b = 0; b < taps.bins(); ++b) {
    const T* PROJECTS_RESTRICT grad = bins + b * channels;
    for (int64_t k = taps.begin[b]; k < taps.begin[b + 1]; ++k) {
      T* PROJECTS_RESTRICT pixel = map + taps.offset[k];
      const T weight = taps.weight[k];
      for (int64_t c = 0; c < channels; ++c) {
        pixel[c] += weight * grad[c];
      }
    }
  }
}

// The pragma allows the compiler to keep one partial sum per vector lane.
template <typename map_t, typename T>
PROJECTS_INLINE void dots_loop(T* dot, const map_t* map, const T* bins, const Taps<T>& taps, int64_t channels) {
  for (int64_t b = 0; b < taps.bins(); ++b) {
    const T* PROJECTS_RESTRICT grad = bins + b * channels;
    for (int64_t k = taps.begin[b]; k < taps.begin[b + 1]; ++k) {
      const map_t* PROJECTS_RESTRICT pixel = map + taps.offset[k];
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < channels; ++c) {
        sum += widen(pixel[c]) * grad[c];
      }
      dot[k] = sum;
    }
  }
}

}  // namespace

#define PROJECTS_DEFINE_READERS(map_t, T)                                                                      \
  PROJECTS_CLONES void gather(T* bins, const map_t* map, const Taps<T>& taps, int64_t channels) {              \
    gather_loop(bins, map, taps, channels);                                                                    \
  }                                                                                                            \
  PROJECTS_CLONES void dots(T* dot, const map_t* map, const T* bins, const Taps<T>& taps, int64_t channels) {  \
    dots_loop(dot, map, bins, taps, channels);                                                                 \
  }

PROJECTS_DEFINE_READERS(double, double)
PROJECTS_DEFINE_READERS(float, float)
PROJECTS_DEFINE_READERS(c10::Half, float)
PROJECTS_DEFINE_READERS(c10::BFloat16, float)

PROJECTS_CLONES void scatter(float* map, const float* bins, const Taps<float>& taps, int64_t channels) {
  scatter_loop(map, bins, taps, channels);
}
PROJECTS_CLONES void scatter(double* map, const double* bins, const Taps<double>& taps, int64_t channels) {
  scatter_loop(map, bins, taps, channels);
}

}  // namespace projects

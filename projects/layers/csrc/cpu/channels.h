// The inner loops over channels: all arithmetic on pixels of the CPU kernels happens here, on channels that lie side by
// side in memory, so that the compiler turns them into vector instructions.
#pragma once

#include <cstdint>
#include <vector>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace projects {

// The pixels under the bins of one RoI, with their weights. Bin b has taps begin[b] to begin[b + 1].
template <typename T>
struct Taps {
  std::vector<int64_t> begin;
  std::vector<int64_t> offset;  // of the pixel's first channel, in elements from `map`
  std::vector<T> weight;

  int64_t bins() const {
    return static_cast<int64_t>(begin.size()) - 1;
  }
};

// For every bin b and channel c, with k over the taps of b:
//   gather:   bins[b][c] = sum_k weight[k] * map[offset[k] + c]
//   scatter:  map[offset[k] + c] += weight[k] * bins[b][c]
//   dots:     dot[k] = sum_c map[offset[k] + c] * bins[b][c]
// `bins` holds bins() x channels numbers. Half types are read as they lie and summed in float.
#define PROJECTS_DECLARE_READERS(map_t, T)                                                          \
  void gather(T* bins, const map_t* map, const Taps<T>& taps, int64_t channels);                    \
  void dots(T* dot, const map_t* map, const T* bins, const Taps<T>& taps, int64_t channels);

PROJECTS_DECLARE_READERS(double, double)
PROJECTS_DECLARE_READERS(float, float)
PROJECTS_DECLARE_READERS(c10::Half, float)
PROJECTS_DECLARE_READERS(c10::BFloat16, float)
#undef PROJECTS_DECLARE_READERS

void scatter(float* map, const float* bins, const Taps<float>& taps, int64_t channels);
void scatter(double* map, const double* bins, const Taps<double>& taps, int64_t channels);

}  // namespace projects

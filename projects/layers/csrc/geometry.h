// The sampling geometry of SgRoIAlign and PrRoIPool: one arithmetic for CPU and CUDA, forward and backward.
//
// Both operators are weighted sums of the pixels under a bin. On one axis, pixel i of the map lies at coordinate i, and
// all lengths here are in feature pixels. T is float (for half types too) or double.
#pragma once

#include <c10/macros/Macros.h>
#include <cmath>
#include <cstdint>

namespace projects {

// What all RoIs of one call have in common.
struct PoolArgs {
  int64_t height, width;           // of the map
  int64_t bin_rows, bin_cols;      // of the output
  double spatial_scale;            // feature pixels per image pixel
  bool aligned;                    // subtract half a pixel after scaling
  int64_t sampling_ratio = 0;      // SgRoIAlign: points per bin and axis, 0 or less: one per feature pixel, rounded up
  int64_t prob_height = 0, prob_width = 0;
};

// `value` limited to [low, high]; NaN becomes low.
template <typename T>
C10_HOST_DEVICE inline T clamp(T value, T low, T high) {
  return value > high ? high : (value > low ? value : low);
}

// The whole number at or below `value`, limited to [0, limit]; `value` may be infinite. (T(limit) may round up: a float
// does not hold every whole number above 2^24.)
template <typename T>
C10_HOST_DEVICE inline int64_t floor_index(T value, int64_t limit) {
  const T whole = clamp(std::floor(value), T(0), static_cast<T>(limit));
  return whole < static_cast<T>(limit) ? static_cast<int64_t>(whole) : limit;
}

// A RoI (batch index, x0, y0, x1, y1 in image pixels) in feature pixels.
template <typename T>
struct Box {
  T x0, y0, x1, y1;

  C10_HOST_DEVICE Box(const T* roi, const PoolArgs& args) {
    const T scale = static_cast<T>(args.spatial_scale);
    const T offset = args.aligned ? T(0.5) : T(0);
    x0 = roi[1] * scale - offset;
    y0 = roi[2] * scale - offset;
    x1 = roi[3] * scale - offset;
    y1 = roi[4] * scale - offset;
  }

  // A box that is not (NaN, infinite, or wider than T can say) takes no part: its output is 0, and so are its gradients.
  C10_HOST_DEVICE bool finite() const {
    const T width = x1 - x0, height = y1 - y0;
    return width - width == T(0) && height - height == T(0);
  }
};

// Two neighbouring pixels and their shares in a linear interpolation between them.
template <typename T>
struct Neighbours {
  int64_t low, high;
  T low_weight, high_weight;

  C10_HOST_DEVICE bool outside() const {
    return low_weight == T(0) && high_weight == T(0);
  }
};

// Interpolation at x with x already inside [0, size - 1].
template <typename T>
C10_HOST_DEVICE inline Neighbours<T> neighbours(T x, int64_t size) {
  const int64_t low = floor_index(x, size - 1);
  if (low >= size - 1) {
    return {size - 1, size - 1, T(1), T(0)};
  }
  const T share = x - static_cast<T>(low);
  if (share == T(0)) {  // a pixel without a share is not named: it may hold NaN
    return {low, low, T(1), T(0)};
  }
  return {low, low + 1, T(1) - share, share};
}

// One axis of a RoI in SgRoIAlign: each bin holds `grid` equidistant sample points.
template <typename T>
struct SampledAxis {
  T start, bin;
  int64_t bins, grid, size;

  C10_HOST_DEVICE SampledAxis(T start, T end, int64_t bins, int64_t size, const PoolArgs& args)
      : start(start), bins(bins), size(size) {
    T length = end - start;
    if (!args.aligned && length < T(1)) {
      length = T(1);
    }
    bin = length / static_cast<T>(bins);
    const int64_t most = int64_t(1) << 30;
    grid = args.sampling_ratio > 0 ? args.sampling_ratio : floor_index(std::ceil(bin), most);
  }

  // Coordinate of point `sample` of bin `k`.
  C10_HOST_DEVICE T position(int64_t k, int64_t sample) const {
    return start + static_cast<T>(k) * bin + (static_cast<T>(sample) + T(0.5)) * bin / static_cast<T>(grid);
  }

  // RoIAlign's border: up to one pixel outside the map the edge is repeated, beyond it the map is 0.
  C10_HOST_DEVICE Neighbours<T> pixels(int64_t k, int64_t sample) const {
    const T x = position(k, sample);
    if (!(x >= T(-1) && x <= static_cast<T>(size))) {
      return {0, 0, T(0), T(0)};
    }
    return neighbours(clamp(x, T(0), static_cast<T>(size - 1)), size);
  }

  // Cells of a probability map of `cells` cells around the same point: the map spans the RoI, cell i covers
  // [i, i + 1) / cells of it, and the edge is repeated.
  C10_HOST_DEVICE Neighbours<T> cells(int64_t k, int64_t sample, int64_t cells) const {
    const T fraction = (static_cast<T>(k) + (static_cast<T>(sample) + T(0.5)) / static_cast<T>(grid)) / static_cast<T>(bins);
    return neighbours(clamp(fraction * static_cast<T>(cells) - T(0.5), T(0), static_cast<T>(cells - 1)), cells);
  }

  // The points [first, last) of bin `k` outside of which none can fall on the map: so a RoI far larger than the map
  // costs no more than the map.
  C10_HOST_DEVICE int64_t first_sample(int64_t k) const {
    return bin > T(0) ? floor_index((T(-1) - position(k, 0)) / step() - T(1), grid) : 0;
  }
  C10_HOST_DEVICE int64_t last_sample(int64_t k) const {
    return bin > T(0) ? floor_index((static_cast<T>(size) - position(k, 0)) / step() + T(3), grid) : grid;
  }

 private:
  C10_HOST_DEVICE T step() const {
    return bin / static_cast<T>(grid);
  }
};

// One axis of a RoI in PrRoIPool: the weight of pixel i in a bin [lower, upper] is the mean over the bin of the hat
// function hat(x - i) = max(0, 1 - |x - i|), which is what linear interpolation integrates to.
template <typename T>
struct IntegratedAxis {
  T start, bin;
  int64_t bins, size;

  C10_HOST_DEVICE IntegratedAxis(T start, T end, int64_t bins, int64_t size)
      : start(start), bin((end > start ? end - start : T(0)) / static_cast<T>(bins)), bins(bins), size(size) {}

  C10_HOST_DEVICE T lower(int64_t k) const {
    return start + static_cast<T>(k) * bin;
  }
  C10_HOST_DEVICE T upper(int64_t k) const {
    return start + static_cast<T>(k + 1) * bin;
  }

  // The pixels [first, last) that bin `k` touches; none when it is empty.
  C10_HOST_DEVICE int64_t first_pixel(int64_t k) const {
    return floor_index(lower(k), size);
  }
  C10_HOST_DEVICE int64_t last_pixel(int64_t k) const {
    return upper(k) > lower(k) ? floor_index(std::ceil(upper(k)) + T(1), size) : first_pixel(k);
  }

  C10_HOST_DEVICE T weight(int64_t k, int64_t i) const {
    const T a = lower(k), b = upper(k), x = static_cast<T>(i);
    return (linear_part(a, b, x - T(1), x, x) + linear_part(a, b, x, x + T(1), x)) / (b - a);
  }

  // Derivatives of weight(k, i) by the bin's ends. The weight is the mean of hat(a + s (b - a) - i) over s in [0, 1], so they
  // are the means of (1 - s) hat' and s hat': exact for the narrowest bins too.
  C10_HOST_DEVICE T weight_by_lower(int64_t k, int64_t i) const {
    const T a = lower(k), b = upper(k), x = static_cast<T>(i);
    return share_of_lower(a, b, x - T(1), x) - share_of_lower(a, b, x, x + T(1));
  }
  C10_HOST_DEVICE T weight_by_upper(int64_t k, int64_t i) const {
    const T a = lower(k), b = upper(k), x = static_cast<T>(i);
    return share_of_upper(a, b, x - T(1), x) - share_of_upper(a, b, x, x + T(1));
  }

  // Derivatives of weight(k, i) by the RoI's ends: lower = start + k / bins * (end - start), upper likewise with k + 1.
  C10_HOST_DEVICE T weight_by_start(int64_t k, int64_t i) const {
    const T n = static_cast<T>(bins);
    return (weight_by_lower(k, i) * static_cast<T>(bins - k) + weight_by_upper(k, i) * static_cast<T>(bins - k - 1)) / n;
  }
  C10_HOST_DEVICE T weight_by_end(int64_t k, int64_t i) const {
    const T n = static_cast<T>(bins);
    return (weight_by_lower(k, i) * static_cast<T>(k) + weight_by_upper(k, i) * static_cast<T>(k + 1)) / n;
  }

 private:
  C10_HOST_DEVICE static T hat(T x) {
    const T distance = x < T(0) ? -x : x;
    return distance < T(1) ? T(1) - distance : T(0);
  }

  // The integral of hat(x - i) over the part of [a, b] within [low, high], where it is linear: length times middle value.
  C10_HOST_DEVICE static T linear_part(T a, T b, T low, T high, T i) {
    const T from = a > low ? a : low, to = b < high ? b : high;
    return to > from ? (to - from) * hat((from + to) / T(2) - i) : T(0);
  }

  // The integrals of 1 - s and of s over the part of [a, b] within [low, high], with s = 0 at a and 1 at b.
  C10_HOST_DEVICE static T share_of_lower(T a, T b, T low, T high) {
    return share_of_upper(-b, -a, -high, -low);
  }
  C10_HOST_DEVICE static T share_of_upper(T a, T b, T low, T high) {
    const T from = a > low ? a : low, to = b < high ? b : high;
    return to > from ? (to - from) / (b - a) * (((from - a) + (to - a)) / (b - a)) / T(2) : T(0);
  }
};

}  // namespace projects

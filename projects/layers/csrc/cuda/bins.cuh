// The pixels under one bin of one RoI and their weights, on the GPU: a list of `count()` taps that the lanes of a warp work
// out in parallel. A tap without a share in the bin adds nothing to values and gradients, whatever its pixel holds.
//
// `add_gradient(t, by_weight)` is called by all 32 lanes at once, with the derivative of the loss by the weight of tap t, and
// 0 from lanes beyond the last tap.
#pragma once

#include <ATen/cuda/Atomic.cuh>

#include "../geometry.h"

namespace projects {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = warp_size / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(all_lanes, value, step);
  }
  return value;
}

template <typename T>
struct Tap {
  int64_t y, x;
  T weight;
};

// SgRoIAlign: four taps, the corners around it, for each sample point.
template <typename T>
struct SampledBins {
  PoolArgs args;
  const T* prob;  // (R, prob_height, prob_width), or null for p = 0
  T* grad_prob;   // the same shape, where add_gradient is used

  class Bin {
   public:
    __device__ Bin(const SampledBins& all, int64_t r, const Box<T>& box, int64_t i, int64_t j)
        : y_(box.y0, box.y1, all.args.bin_rows, all.args.height, all.args),
          x_(box.x0, box.x1, all.args.bin_cols, all.args.width, all.args),
          i_(i),
          j_(j),
          y_first_(y_.first_sample(i)),
          x_first_(x_.first_sample(j)),
          rows_(max_of(y_.last_sample(i) - y_first_, 0)),
          columns_(max_of(x_.last_sample(j) - x_first_, 0)),
          prob_height_(all.args.prob_height),
          prob_width_(all.args.prob_width),
          share_(T(1) / (static_cast<T>(max_of(y_.grid, 1)) * static_cast<T>(max_of(x_.grid, 1)))),
          prob_(all.prob == nullptr ? nullptr : all.prob + r * prob_height_ * prob_width_),
          grad_prob_(all.grad_prob == nullptr ? nullptr : all.grad_prob + r * prob_height_ * prob_width_) {}

    __device__ int64_t count() const {
      return 4 * rows_ * columns_;
    }

    __device__ Tap<T> tap(int64_t t) const {
      const Corner at = corner(t);
      T scale = share_;
      if (prob_ != nullptr && at.weight != T(0)) {
        const Neighbours<T> v = y_.cells(i_, at.y_sample, prob_height_), u = x_.cells(j_, at.x_sample, prob_width_);
        const T *low = prob_ + v.low * prob_width_, *high = prob_ + v.high * prob_width_;
        scale *= T(1) + v.low_weight * (u.low_weight * low[u.low] + u.high_weight * low[u.high]) +
            v.high_weight * (u.low_weight * high[u.low] + u.high_weight * high[u.high]);
      }
      return {at.y, at.x, at.weight * scale};
    }

    __device__ void add_gradient(int64_t t, T by_weight) const {
      const bool exists = t < count();
      const Corner at = corner(exists ? t : 0);
      T by_p = exists && at.weight != T(0) ? by_weight * at.weight * share_ : T(0);  // a pixel of weight 0 may be NaN
      by_p += __shfl_xor_sync(all_lanes, by_p, 1);  // the four corners of a point are four lanes in a row
      by_p += __shfl_xor_sync(all_lanes, by_p, 2);
      if (exists && t % 4 == 0 && by_p != T(0)) {
        const Neighbours<T> v = y_.cells(i_, at.y_sample, prob_height_), u = x_.cells(j_, at.x_sample, prob_width_);
        T *low = grad_prob_ + v.low * prob_width_, *high = grad_prob_ + v.high * prob_width_;
        gpuAtomicAddNoReturn(low + u.low, by_p * v.low_weight * u.low_weight);
        gpuAtomicAddNoReturn(low + u.high, by_p * v.low_weight * u.high_weight);
        gpuAtomicAddNoReturn(high + u.low, by_p * v.high_weight * u.low_weight);
        gpuAtomicAddNoReturn(high + u.high, by_p * v.high_weight * u.high_weight);
      }
    }

   private:
    struct Corner {
      int64_t y_sample, x_sample, y, x;
      T weight;  // its share in the interpolation
    };

    __device__ static int64_t max_of(int64_t a, int64_t b) {
      return a > b ? a : b;
    }

    __device__ Corner corner(int64_t t) const {
      const int64_t point = t / 4, y_sample = y_first_ + point / columns_, x_sample = x_first_ + point % columns_;
      const Neighbours<T> y = y_.pixels(i_, y_sample), x = x_.pixels(j_, x_sample);
      const bool lower = t & 2, right = t & 1;
      return {
          y_sample,
          x_sample,
          lower ? y.high : y.low,
          right ? x.high : x.low,
          (lower ? y.high_weight : y.low_weight) * (right ? x.high_weight : x.low_weight)};
    }

    SampledAxis<T> y_, x_;
    int64_t i_, j_, y_first_, x_first_, rows_, columns_, prob_height_, prob_width_;
    T share_;
    const T* prob_;
    T* grad_prob_;
  };

  __device__ Bin bin(int64_t r, const Box<T>& box, int64_t i, int64_t j) const {
    return Bin(*this, r, box, i, j);
  }
};

// PrRoIPool: a tap for each pixel.
template <typename T>
struct IntegratedBins {
  PoolArgs args;
  T* grad_rois;  // (R, 5) in feature pixels, where add_gradient is used

  class Bin {
   public:
    __device__ Bin(const IntegratedBins& all, int64_t r, const Box<T>& box, int64_t i, int64_t j)
        : y_(box.y0, box.y1, all.args.bin_rows, all.args.height),
          x_(box.x0, box.x1, all.args.bin_cols, all.args.width),
          i_(i),
          j_(j),
          y_first_(y_.first_pixel(i)),
          x_first_(x_.first_pixel(j)),
          rows_(y_.last_pixel(i) - y_first_),
          columns_(x_.last_pixel(j) - x_first_),
          grad_box_(all.grad_rois == nullptr ? nullptr : all.grad_rois + r * 5 + 1) {}

    __device__ int64_t count() const {
      return rows_ * columns_;
    }

    __device__ Tap<T> tap(int64_t t) const {
      const int64_t y = y_first_ + t / columns_, x = x_first_ + t % columns_;
      return {y, x, y_.weight(i_, y) * x_.weight(j_, x)};
    }

    __device__ void add_gradient(int64_t t, T by_weight) const {
      T by_box[4] = {T(0), T(0), T(0), T(0)};
      if (t < count()) {
        const int64_t y = y_first_ + t / columns_, x = x_first_ + t % columns_;
        const T y_weight = y_.weight(i_, y), x_weight = x_.weight(j_, x);
        by_box[0] = y_weight * x_.weight_by_start(j_, x);
        by_box[1] = x_weight * y_.weight_by_start(i_, y);
        by_box[2] = y_weight * x_.weight_by_end(j_, x);
        by_box[3] = x_weight * y_.weight_by_end(i_, y);
      }
      for (int side = 0; side < 4; ++side) {
        const T sum = warp_sum(by_box[side] == T(0) ? T(0) : by_box[side] * by_weight);  // a pixel without part may be NaN
        if (threadIdx.x % warp_size == 0) {
          gpuAtomicAddNoReturn(grad_box_ + side, sum);
        }
      }
    }

   private:
    IntegratedAxis<T> y_, x_;
    int64_t i_, j_, y_first_, x_first_, rows_, columns_;
    T* grad_box_;
  };

  __device__ Bin bin(int64_t r, const Box<T>& box, int64_t i, int64_t j) const {
    return Bin(*this, r, box, i, j);
  }
};

}  // namespace projects

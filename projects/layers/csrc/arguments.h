// The operators' arguments as the kernels take them, with the checks that memory safety rests on. (The Python functions
// report the same faults in more words.)
#pragma once

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "geometry.h"

namespace projects {

// The type of coordinates, weights and sums: float for half types.
inline at::ScalarType sum_type(const at::Tensor& tensor) {
  return at::toOpMathType(tensor.scalar_type());
}

inline void check_map(const at::Tensor& features, const at::Tensor& rois) {
  TORCH_CHECK(
      features.dim() == 4 && features.size(2) > 0 && features.size(3) > 0,
      "features must be (N, C, H, W) with H, W > 0, got ", features.sizes());
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "rois must be (R, 5), got ", rois.sizes());
  TORCH_CHECK(rois.device() == features.device(), "rois are on ", rois.device(), ", features on ", features.device());
}

inline void check_prob(const at::Tensor& prob, const at::Tensor& rois) {
  TORCH_CHECK(
      prob.dim() == 4 && prob.size(0) == rois.size(0) && prob.size(1) == 1 && prob.size(2) > 0 && prob.size(3) > 0,
      "prob must be (", rois.size(0), ", 1, Hp, Wp) with Hp, Wp > 0, got ", prob.sizes());
  TORCH_CHECK(prob.device() == rois.device(), "prob is on ", prob.device(), ", rois on ", rois.device());
}

inline void check_grad(const at::Tensor& grad, const at::Tensor& rois, at::IntArrayRef map_size) {
  TORCH_CHECK(
      grad.dim() == 4 && map_size.size() == 4 && grad.size(0) == rois.size(0) && grad.size(1) == map_size[1],
      "the gradient must be (R, C, rows, columns) of ", rois.size(0), " RoIs and a map ", map_size, ", got ", grad.sizes());
  TORCH_CHECK(grad.device() == rois.device(), "the gradient is on ", grad.device(), ", rois on ", rois.device());
}

inline PoolArgs pool_args(
    at::IntArrayRef map_size, at::IntArrayRef bins, double spatial_scale, bool aligned) {
  TORCH_CHECK(
      bins.size() == 2 && bins[0] > 0 && bins[1] > 0, "output_size must be two positive numbers, got ", bins);
  PoolArgs args;
  args.height = map_size[2];
  args.width = map_size[3];
  args.bin_rows = bins[0];
  args.bin_cols = bins[1];
  args.spatial_scale = spatial_scale;
  args.aligned = aligned;
  return args;
}

// Points per bin and axis that a caller may ask for: more would overflow counts of points.
constexpr int64_t most_points = 1024;

// PoolArgs of SgRoIAlign.
inline PoolArgs sampled_args(
    PoolArgs args, int64_t sampling_ratio, const std::optional<at::Tensor>& prob, const at::Tensor& rois) {
  TORCH_CHECK(sampling_ratio <= most_points, "sampling_ratio must be at most ", most_points, ", got ", sampling_ratio);
  args.sampling_ratio = sampling_ratio;
  if (prob.has_value()) {
    check_prob(*prob, rois);
    args.prob_height = prob->size(2);
    args.prob_width = prob->size(3);
  }
  return args;
}

// Dense values of type T.
template <typename T>
at::Tensor values_of(const at::Tensor& tensor) {
  return tensor.to(c10::CppTypeToScalarType<T>::value).contiguous();
}
template <typename T>
at::Tensor values_of(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? values_of<T>(*tensor) : at::Tensor();
}
template <typename T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// Outputs keep the map's memory format: channels_last only where the map cannot be read as NCHW.
inline at::MemoryFormat format_of(const at::Tensor& features) {
  return features.is_contiguous(at::MemoryFormat::ChannelsLast) && !features.is_contiguous()
      ? at::MemoryFormat::ChannelsLast
      : at::MemoryFormat::Contiguous;
}

}  // namespace projects

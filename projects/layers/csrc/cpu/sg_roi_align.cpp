#include <torch/library.h>

#include "pool.h"

namespace projects {
namespace {

at::Tensor forward(
    const at::Tensor& features,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& prob,
    at::IntArrayRef output_size,
    double spatial_scale,
    int64_t sampling_ratio,
    bool aligned) {
  check_map(features, rois);
  const PoolArgs args = sampled_args(
      pool_args(features.sizes(), output_size, spatial_scale, aligned), sampling_ratio, prob, rois);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "sg_roi_align", [&] {
    using T = at::opmath_type<scalar_t>;
    const at::Tensor probs = values_of<T>(prob);
    return pool_forward<scalar_t>(features, rois, args, [&](int64_t r, const Box<T>& box) {
      return SampledWindow<T>(args, box, data_or_null<T>(probs), r);
    });
  });
}

at::Tensor grad_features(
    const at::Tensor& grad,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& prob,
    at::IntArrayRef size,
    bool channels_last,
    double spatial_scale,
    int64_t sampling_ratio,
    bool aligned) {
  check_grad(grad, rois, size);
  const PoolArgs args =
      sampled_args(pool_args(size, {grad.size(2), grad.size(3)}, spatial_scale, aligned), sampling_ratio, prob, rois);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "sg_roi_align_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const at::Tensor probs = values_of<T>(prob);
    return pool_grad_features<scalar_t>(grad, rois, size, channels_last, args, [&](int64_t r, const Box<T>& box) {
      return SampledWindow<T>(args, box, data_or_null<T>(probs), r);
    });
  });
}

at::Tensor grad_prob(
    const at::Tensor& grad,
    const at::Tensor& features,
    const at::Tensor& rois,
    const at::Tensor& prob,
    double spatial_scale,
    int64_t sampling_ratio,
    bool aligned) {
  check_map(features, rois);
  check_grad(grad, rois, features.sizes());
  const PoolArgs args = sampled_args(
      pool_args(features.sizes(), {grad.size(2), grad.size(3)}, spatial_scale, aligned), sampling_ratio, prob, rois);
  at::Tensor sums = at::zeros(prob.sizes(), prob.options().dtype(sum_type(features)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "sg_roi_align_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const at::Tensor probs = values_of<T>(prob);
    T* sums_data = sums.mutable_data_ptr<T>();
    pool_grad_windows<scalar_t>(
        grad, features, rois, args,
        [&](int64_t r, const Box<T>& box) { return SampledWindow<T>(args, box, data_or_null<T>(probs), r); },
        [&](int64_t r, const SampledWindow<T>& window, int64_t i, int64_t j, const T* by_weight) {
          window.add_gradient(i, j, by_weight, sums_data + r * sums.stride(0));
        });
  });
  return sums.to(prob.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(projects, CPU, m) {
  m.impl("sg_roi_align", forward);
  m.impl("sg_roi_align_grad_features", grad_features);
  m.impl("sg_roi_align_grad_prob", grad_prob);
}

}  // namespace projects

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "pool.cuh"

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
  const c10::cuda::CUDAGuard guard(features.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "sg_roi_align", [&] {
    using T = at::opmath_type<scalar_t>;
    const at::Tensor probs = values_of<T>(prob);
    const SampledBins<T> bins{args, data_or_null<T>(probs), nullptr};
    return pool_forward<scalar_t, T>(features, rois, bins);
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
  at::globalContext().alertNotDeterministic("sg_roi_align_grad_features on CUDA");
  check_grad(grad, rois, size);
  const PoolArgs args =
      sampled_args(pool_args(size, {grad.size(2), grad.size(3)}, spatial_scale, aligned), sampling_ratio, prob, rois);
  const c10::cuda::CUDAGuard guard(grad.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "sg_roi_align_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const at::Tensor probs = values_of<T>(prob);
    const SampledBins<T> bins{args, data_or_null<T>(probs), nullptr};
    return pool_grad_features<scalar_t, T>(grad, rois, size, channels_last, bins);
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
  at::globalContext().alertNotDeterministic("sg_roi_align_grad_prob on CUDA");
  check_map(features, rois);
  check_grad(grad, rois, features.sizes());
  const PoolArgs args = sampled_args(
      pool_args(features.sizes(), {grad.size(2), grad.size(3)}, spatial_scale, aligned), sampling_ratio, prob, rois);
  const c10::cuda::CUDAGuard guard(features.device());
  at::Tensor sums = at::zeros(prob.sizes(), prob.options().dtype(sum_type(features)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "sg_roi_align_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const at::Tensor probs = values_of<T>(prob);
    const SampledBins<T> bins{args, data_or_null<T>(probs), sums.mutable_data_ptr<T>()};
    pool_grad_weights<scalar_t, T>(grad, features, rois, bins);
  });
  return sums.to(prob.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(projects, CUDA, m) {
  m.impl("sg_roi_align", forward);
  m.impl("sg_roi_align_grad_features", grad_features);
  m.impl("sg_roi_align_grad_prob", grad_prob);
}

}  // namespace projects

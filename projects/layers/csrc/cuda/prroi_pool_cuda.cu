#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "pool.cuh"

namespace projects {
namespace {

at::Tensor forward(
    const at::Tensor& features, const at::Tensor& rois, at::IntArrayRef output_size, double spatial_scale, bool aligned) {
  check_map(features, rois);
  const PoolArgs args = pool_args(features.sizes(), output_size, spatial_scale, aligned);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "prroi_pool", [&] {
    using T = at::opmath_type<scalar_t>;
    return pool_forward<scalar_t, T>(features, rois, IntegratedBins<T>{args, nullptr});
  });
}

at::Tensor grad_features(
    const at::Tensor& grad,
    const at::Tensor& rois,
    at::IntArrayRef size,
    bool channels_last,
    double spatial_scale,
    bool aligned) {
  at::globalContext().alertNotDeterministic("prroi_pool_grad_features on CUDA");
  check_grad(grad, rois, size);
  const PoolArgs args = pool_args(size, {grad.size(2), grad.size(3)}, spatial_scale, aligned);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "prroi_pool_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    return pool_grad_features<scalar_t, T>(grad, rois, size, channels_last, IntegratedBins<T>{args, nullptr});
  });
}

at::Tensor grad_rois(
    const at::Tensor& grad, const at::Tensor& features, const at::Tensor& rois, double spatial_scale, bool aligned) {
  at::globalContext().alertNotDeterministic("prroi_pool_grad_rois on CUDA");
  check_map(features, rois);
  check_grad(grad, rois, features.sizes());
  const PoolArgs args = pool_args(features.sizes(), {grad.size(2), grad.size(3)}, spatial_scale, aligned);
  const c10::cuda::CUDAGuard guard(features.device());
  at::Tensor sums = at::zeros(rois.sizes(), rois.options().dtype(sum_type(features)));  // column 0 stays 0
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "prroi_pool_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    pool_grad_weights<scalar_t, T>(grad, features, rois, IntegratedBins<T>{args, sums.mutable_data_ptr<T>()});
  });
  return sums.mul_(spatial_scale).to(rois.scalar_type());  // feature pixels to image pixels
}

}  // namespace

TORCH_LIBRARY_IMPL(projects, CUDA, m) {
  m.impl("prroi_pool", forward);
  m.impl("prroi_pool_grad_features", grad_features);
  m.impl("prroi_pool_grad_rois", grad_rois);
}

}  // namespace projects

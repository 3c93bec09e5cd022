#include <torch/library.h>

#include "pool.h"

namespace projects {
namespace {

at::Tensor forward(
    const at::Tensor& features, const at::Tensor& rois, at::IntArrayRef output_size, double spatial_scale, bool aligned) {
  check_map(features, rois);
  const PoolArgs args = pool_args(features.sizes(), output_size, spatial_scale, aligned);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "prroi_pool", [&] {
    using T = at::opmath_type<scalar_t>;
    return pool_forward<scalar_t>(
        features, rois, args, [&](int64_t, const Box<T>& box) { return IntegratedWindow<T>(args, box); });
  });
}

at::Tensor grad_features(
    const at::Tensor& grad,
    const at::Tensor& rois,
    at::IntArrayRef size,
    bool channels_last,
    double spatial_scale,
    bool aligned) {
  check_grad(grad, rois, size);
  const PoolArgs args = pool_args(size, {grad.size(2), grad.size(3)}, spatial_scale, aligned);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "prroi_pool_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    return pool_grad_features<scalar_t>(
        grad, rois, size, channels_last, args,
        [&](int64_t, const Box<T>& box) { return IntegratedWindow<T>(args, box); });
  });
}

at::Tensor grad_rois(
    const at::Tensor& grad, const at::Tensor& features, const at::Tensor& rois, double spatial_scale, bool aligned) {
  check_map(features, rois);
  check_grad(grad, rois, features.sizes());
  const PoolArgs args = pool_args(features.sizes(), {grad.size(2), grad.size(3)}, spatial_scale, aligned);
  at::Tensor sums = at::zeros(rois.sizes(), rois.options().dtype(sum_type(features)));  // column 0 stays 0
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "prroi_pool_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    T* sums_data = sums.mutable_data_ptr<T>();
    pool_grad_windows<scalar_t>(
        grad, features, rois, args,
        [&](int64_t, const Box<T>& box) { return IntegratedWindow<T>(args, box); },
        [&](int64_t r, const IntegratedWindow<T>& window, int64_t i, int64_t j, const T* by_weight) {
          window.add_gradient(i, j, by_weight, sums_data + r * 5 + 1);
        });
  });
  return sums.mul_(spatial_scale).to(rois.scalar_type());  // feature pixels to image pixels
}

}  // namespace

TORCH_LIBRARY_IMPL(projects, CPU, m) {
  m.impl("prroi_pool", forward);
  m.impl("prroi_pool_grad_features", grad_features);
  m.impl("prroi_pool_grad_rois", grad_rois);
}

}  // namespace projects

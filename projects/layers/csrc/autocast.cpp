// Under autocast the map keeps its type (half types are summed in float anyway), and boxes and probability maps, whatever
// floating type they come in, are read in the type of the sums, so that coordinates lose nothing.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "arguments.h"

namespace projects {
namespace {

constexpr auto autocast_keys = c10::DispatchKeySet({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});

at::Tensor sg_roi_align(
    const at::Tensor& features,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& prob,
    at::IntArrayRef output_size,
    double spatial_scale,
    int64_t sampling_ratio,
    bool aligned) {
  const c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("projects::sg_roi_align", "")
                             .typed<decltype(sg_roi_align)>();
  const auto type = sum_type(features);
  const auto wide_prob = prob.has_value() ? std::make_optional(prob->to(type)) : std::nullopt;
  return op.call(features, rois.to(type), wide_prob, output_size, spatial_scale, sampling_ratio, aligned);
}

at::Tensor prroi_pool(
    const at::Tensor& features, const at::Tensor& rois, at::IntArrayRef output_size, double spatial_scale, bool aligned) {
  const c10::impl::ExcludeDispatchKeyGuard guard(autocast_keys);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("projects::prroi_pool", "").typed<decltype(prroi_pool)>();
  return op.call(features, rois.to(sum_type(features)), output_size, spatial_scale, aligned);
}

}  // namespace

TORCH_LIBRARY_IMPL(projects, AutocastCPU, m) {
  m.impl("sg_roi_align", sg_roi_align);
  m.impl("prroi_pool", prroi_pool);
}

TORCH_LIBRARY_IMPL(projects, AutocastCUDA, m) {
  m.impl("sg_roi_align", sg_roi_align);
  m.impl("prroi_pool", prroi_pool);
}

}  // namespace projects

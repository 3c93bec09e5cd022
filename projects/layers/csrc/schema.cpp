// The extension module, and the operators that it adds to torch.ops.projects. The kernels register themselves in cpu/ and
// cuda/, autocast in autocast.cpp, gradients and fake kernels in ../extension.py.
#include <Python.h>
#include <torch/library.h>

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

namespace {

bool has_cuda() {
#ifdef WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY(projects, m) {
  m.def("has_cuda() -> bool", has_cuda);
  m.def(
      "sg_roi_align(Tensor features, Tensor rois, Tensor? prob, int[2] output_size, float spatial_scale, "
      "int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "sg_roi_align_grad_features(Tensor grad, Tensor rois, Tensor? prob, SymInt[] size, bool channels_last, "
      "float spatial_scale, int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "sg_roi_align_grad_prob(Tensor grad, Tensor features, Tensor rois, Tensor prob, float spatial_scale, "
      "int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "prroi_pool(Tensor features, Tensor rois, int[2] output_size, float spatial_scale, bool aligned) -> Tensor");
  m.def(
      "prroi_pool_grad_features(Tensor grad, Tensor rois, SymInt[] size, bool channels_last, float spatial_scale, "
      "bool aligned) -> Tensor");
  m.def(
      "prroi_pool_grad_rois(Tensor grad, Tensor features, Tensor rois, float spatial_scale, bool aligned) -> Tensor");
}

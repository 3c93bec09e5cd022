// The three passes that SgRoIAlign and PrRoIPool share on the GPU. `Bins` gives the taps of a bin (see bins.cuh).
//
// A block takes 16 bins of one RoI, a warp one bin at a time: its lanes work out a tap each, once, and then go through the
// taps together with 8 channels per lane. Maps are read with the channels of a pixel side by side. Values of bins pass
// through shared memory where the tensor is NCHW, so that global memory is always accessed in runs.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/cuda/Atomic.cuh>
#include <c10/cuda/CUDAGuard.h>

#include "../arguments.h"
#include "bins.cuh"
#include "layout.cuh"

namespace projects {

constexpr int warps = 8, block_threads = warps * warp_size;
constexpr int block_bins = 16;                          // of one RoI
constexpr int lane_channels = 8;                        // in registers
constexpr int pass_channels = lane_channels * warp_size;  // that a block works on at a time

template <typename scalar_t, int N>
struct alignas(sizeof(scalar_t) * N) Vector {
  scalar_t value[N];
};

// Which of its channels, of `pass_channels`, a lane holds: groups of N side by side, the warp's groups in a row.
template <int N>
__device__ __forceinline__ int lane_channel(int k) {
  return (k / N * warp_size + threadIdx.x % warp_size) * N + k % N;
}

// Reads the lane's channels of a pixel whose pass begins at `pixel` and has `n` channels; beyond them 0.
template <int N, typename T, typename scalar_t>
__device__ __forceinline__ void read_channels(T (&to)[lane_channels], const scalar_t* pixel, int64_t n) {
#pragma unroll
  for (int k = 0; k < lane_channels; k += N) {
    const int c = lane_channel<N>(k);
    if (c < n) {  // n is a multiple of N
      const auto group = *reinterpret_cast<const Vector<scalar_t, N>*>(pixel + c);
#pragma unroll
      for (int m = 0; m < N; ++m) {
        to[k + m] = static_cast<T>(group.value[m]);
      }
    } else {
#pragma unroll
      for (int m = 0; m < N; ++m) {
        to[k + m] = T(0);
      }
    }
  }
}

// Where the block stands: RoI r, bins first to first + count - 1 of its `all`.
struct BlockBins {
  int64_t r, first, all;
  int count;

  __device__ explicit BlockBins(const PoolArgs& args) : all(args.bin_rows * args.bin_cols) {
    const int64_t blocks = (all + block_bins - 1) / block_bins;
    r = blockIdx.x / blocks;
    first = blockIdx.x % blocks * block_bins;
    count = static_cast<int>(all - first < block_bins ? all - first : block_bins);
  }
};

inline int64_t block_count(int64_t rois, const PoolArgs& args) {
  return rois * ((args.bin_rows * args.bin_cols + block_bins - 1) / block_bins);
}

// The image of a RoI, or -1 for a box that takes no part.
template <typename T>
__device__ __forceinline__ int64_t image_of(const T* roi, int64_t r, const Box<T>& box, int64_t images) {
  const bool exists = roi[0] >= T(0) && roi[0] < static_cast<T>(images);
  if (!exists) {
    if (threadIdx.x == 0) {  // the thread that prints is the one that stops the kernel
      printf(
          "the batch index of RoI %lld must be in [0, %lld), got %f\n",
          static_cast<long long>(r), static_cast<long long>(images), static_cast<double>(roi[0]));
      CUDA_KERNEL_ASSERT(false && "batch index of a RoI out of range");
    }
    return -1;
  }
  return box.finite() ? static_cast<int64_t>(roi[0]) : -1;
}

// Calls visit(k, offset, weight) for the taps of a bin in groups of up to 32, with k the place in the group, and
// end_of_group(t) with t the lane's own tap after each group. All lanes see all taps.
template <typename T, typename Bin, typename Visit, typename EndOfGroup>
__device__ __forceinline__ void for_taps(
    const Bin& bin, int64_t row_stride, int64_t column_stride, const Visit& visit, const EndOfGroup& end_of_group) {
  const int lane = threadIdx.x % warp_size;
  const int64_t count = bin.count();
  for (int64_t first = 0; first < count; first += warp_size) {
    int64_t offset = 0;
    T weight = 0;
    if (first + lane < count) {
      const Tap<T> tap = bin.tap(first + lane);
      offset = tap.y * row_stride + tap.x * column_stride;
      weight = tap.weight;
    }
    const int group = static_cast<int>(count - first < warp_size ? count - first : warp_size);
#pragma unroll 4
    for (int k = 0; k < group; ++k) {
      visit(k, __shfl_sync(all_lanes, offset, k), __shfl_sync(all_lanes, weight, k));
    }
    end_of_group(first + lane);
  }
}

template <int N, typename scalar_t, typename T, typename Bins>
__global__ void __launch_bounds__(block_threads)
    forward_kernel(scalar_t* output, bool channels_last, DeviceMap<const scalar_t> map, const T* rois, Bins bins) {
  __shared__ T staged[pass_channels][block_bins + 1];
  const BlockBins block(bins.args);
  const T* roi = rois + block.r * 5;
  const Box<T> box(roi, bins.args);
  const int64_t image = image_of(roi, block.r, box, map.images);
  for (int64_t first = 0; first < map.channels; first += pass_channels) {
    const int64_t n = map.channels - first < pass_channels ? map.channels - first : pass_channels;
    for (int b = threadIdx.x / warp_size; b < block.count; b += warps) {
      const int64_t place = block.first + b;
      T sum[lane_channels] = {};
      if (image >= 0) {
        const scalar_t* channels = map.data + image * map.image_stride + first;
        for_taps<T>(
            bins.bin(block.r, box, place / bins.args.bin_cols, place % bins.args.bin_cols),
            map.row_stride,
            map.column_stride,
            [&](int, int64_t offset, T weight) {
              if (weight != T(0)) {
                T pixel[lane_channels];
                read_channels<N>(pixel, channels + offset, n);
#pragma unroll
                for (int k = 0; k < lane_channels; ++k) {
                  sum[k] += weight * pixel[k];
                }
              }
            },
            [](int64_t) {});
      }
#pragma unroll
      for (int k = 0; k < lane_channels; ++k) {
        const int c = lane_channel<N>(k);
        if (!channels_last) {
          staged[c][b] = sum[k];
        } else if (c < n) {
          output[(block.r * block.all + place) * map.channels + first + c] = static_cast<scalar_t>(sum[k]);
        }
      }
    }
    if (!channels_last) {
      __syncthreads();
      for (int e = threadIdx.x; e < n * block_bins; e += block_threads) {
        const int c = e / block_bins, b = e % block_bins;
        if (b < block.count) {
          output[(block.r * map.channels + first + c) * block.all + block.first + b] = static_cast<scalar_t>(staged[c][b]);
        }
      }
      __syncthreads();
    }
  }
}

// Brings the block's part of an NCHW gradient, `n` channels from `first` on, into shared memory.
template <typename T, typename scalar_t>
__device__ __forceinline__ void stage_gradient(
    T (&staged)[pass_channels][block_bins + 1],
    const scalar_t* grad,
    const BlockBins& block,
    int64_t channels,
    int64_t first,
    int64_t n) {
  __syncthreads();
  for (int e = threadIdx.x; e < n * block_bins; e += block_threads) {
    const int c = e / block_bins, b = e % block_bins;
    if (b < block.count) {
      staged[c][b] = static_cast<T>(grad[(block.r * channels + first + c) * block.all + block.first + b]);
    }
  }
  __syncthreads();
}

// The lane's channels of bin b of the block, from shared memory (NCHW) or from the gradient itself.
template <int N, typename T, typename scalar_t>
__device__ __forceinline__ void read_gradient(
    T (&to)[lane_channels],
    const T (&staged)[pass_channels][block_bins + 1],
    const scalar_t* grad,
    bool channels_last,
    const BlockBins& block,
    int b,
    int64_t channels,
    int64_t first,
    int64_t n) {
#pragma unroll
  for (int k = 0; k < lane_channels; ++k) {
    const int c = lane_channel<N>(k);
    to[k] = c >= n ? T(0)
        : channels_last ? static_cast<T>(grad[(block.r * block.all + block.first + b) * channels + first + c])
                        : staged[c][b];
  }
}

// Gradient of the map, added up in `sums`. Lanes hold channels 32 apart (N = 1), so that a warp's additions form runs.
template <typename scalar_t, typename T, typename Bins>
__global__ void __launch_bounds__(block_threads)
    grad_features_kernel(DeviceMap<T> sums, const scalar_t* grad, bool channels_last, const T* rois, Bins bins) {
  __shared__ T staged[pass_channels][block_bins + 1];
  const BlockBins block(bins.args);
  const T* roi = rois + block.r * 5;
  const Box<T> box(roi, bins.args);
  const int64_t image = image_of(roi, block.r, box, sums.images);
  if (image < 0) {
    return;  // the whole block
  }
  for (int64_t first = 0; first < sums.channels; first += pass_channels) {
    const int64_t n = sums.channels - first < pass_channels ? sums.channels - first : pass_channels;
    if (!channels_last) {
      stage_gradient(staged, grad, block, sums.channels, first, n);
    }
    T* channels = sums.data + image * sums.image_stride + first;
    for (int b = threadIdx.x / warp_size; b < block.count; b += warps) {
      const int64_t place = block.first + b;
      T by_bin[lane_channels];
      read_gradient<1>(by_bin, staged, grad, channels_last, block, b, sums.channels, first, n);
      for_taps<T>(
          bins.bin(block.r, box, place / bins.args.bin_cols, place % bins.args.bin_cols),
          sums.row_stride,
          sums.column_stride,
          [&](int, int64_t offset, T weight) {
            if (weight != T(0)) {
#pragma unroll
              for (int k = 0; k < lane_channels; ++k) {
                const int c = lane_channel<1>(k);
                if (c < n) {
                  gpuAtomicAddNoReturn(channels + offset + c, weight * by_bin[k]);
                }
              }
            }
          },
          [](int64_t) {});
    }
  }
}

// Gradient of the weights: the product of a pixel's channels and the bin's gradient, handed to the lane that worked out
// the tap, which passes it on.
template <int N, typename scalar_t, typename T, typename Bins>
__global__ void __launch_bounds__(block_threads) grad_weights_kernel(
    const scalar_t* grad, bool channels_last, DeviceMap<const scalar_t> map, const T* rois, Bins bins) {
  __shared__ T staged[pass_channels][block_bins + 1];
  const BlockBins block(bins.args);
  const T* roi = rois + block.r * 5;
  const Box<T> box(roi, bins.args);
  const int64_t image = image_of(roi, block.r, box, map.images);
  if (image < 0) {
    return;  // the whole block
  }
  for (int64_t first = 0; first < map.channels; first += pass_channels) {
    const int64_t n = map.channels - first < pass_channels ? map.channels - first : pass_channels;
    if (!channels_last) {
      stage_gradient(staged, grad, block, map.channels, first, n);
    }
    const scalar_t* channels = map.data + image * map.image_stride + first;
    for (int b = threadIdx.x / warp_size; b < block.count; b += warps) {
      const int64_t place = block.first + b;
      T by_bin[lane_channels];
      read_gradient<N>(by_bin, staged, grad, channels_last, block, b, map.channels, first, n);
      const auto bin = bins.bin(block.r, box, place / bins.args.bin_cols, place % bins.args.bin_cols);
      T mine = 0;
      for_taps<T>(
          bin,
          map.row_stride,
          map.column_stride,
          [&](int tap, int64_t offset, T) {
            T pixel[lane_channels], product = 0;
            read_channels<N>(pixel, channels + offset, n);
#pragma unroll
            for (int k = 0; k < lane_channels; ++k) {
              product += pixel[k] * by_bin[k];
            }
            product = warp_sum(product);
            if (threadIdx.x % warp_size == tap) {
              mine = product;
            }
          },
          [&](int64_t t) {
            bin.add_gradient(t, mine);
            mine = 0;
          });
    }
  }
}

// Calls launch(std::integral_constant<int, N>) with N the number of channels that one 16-byte access reads, or 1.
template <typename scalar_t, typename Launch>
void with_vectors(const DeviceMap<const scalar_t>& map, const Launch& launch) {
  constexpr int N = 16 / sizeof(scalar_t);
  if (map.aligned_to(N)) {
    launch(std::integral_constant<int, N>());
  } else {
    launch(std::integral_constant<int, 1>());
  }
}

template <typename scalar_t, typename T, typename Bins>
at::Tensor pool_forward(const at::Tensor& features, const at::Tensor& rois_any, const Bins& bins) {
  const c10::cuda::CUDAGuard guard(features.device());
  const at::Tensor rois = values_of<T>(rois_any);
  const at::MemoryFormat format = format_of(features);
  at::Tensor output = at::empty(
      {rois.size(0), features.size(1), bins.args.bin_rows, bins.args.bin_cols}, features.options().memory_format(format));
  if (output.numel() == 0) {
    return output;
  }
  const at::Tensor map_tensor = with_channels_last<scalar_t>(features);
  const DeviceMap<const scalar_t> map(map_tensor.const_data_ptr<scalar_t>(), map_tensor);
  with_vectors(map, [&](auto n) {
    forward_kernel<n.value><<<
        grid_size(block_count(rois.size(0), bins.args)), block_threads, 0, at::cuda::getCurrentCUDAStream()>>>(
        output.mutable_data_ptr<scalar_t>(),
        format == at::MemoryFormat::ChannelsLast,
        map,
        rois.const_data_ptr<T>(),
        bins);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

template <typename scalar_t, typename T, typename Bins>
at::Tensor pool_grad_features(
    const at::Tensor& grad_any,
    const at::Tensor& rois_any,
    at::IntArrayRef map_size,
    bool channels_last,
    const Bins& bins) {
  const c10::cuda::CUDAGuard guard(grad_any.device());
  const at::Tensor grad = grad_any.contiguous(format_of(grad_any));
  const at::Tensor rois = values_of<T>(rois_any);
  at::Tensor sums =
      at::empty(
          map_size, grad.options().dtype(c10::CppTypeToScalarType<T>::value).memory_format(at::MemoryFormat::ChannelsLast))
          .zero_();
  if (grad.numel() > 0 && sums.numel() > 0) {
    grad_features_kernel<<<
        grid_size(block_count(rois.size(0), bins.args)), block_threads, 0, at::cuda::getCurrentCUDAStream()>>>(
        DeviceMap<T>(sums.mutable_data_ptr<T>(), sums),
        grad.const_data_ptr<scalar_t>(),
        format_of(grad) == at::MemoryFormat::ChannelsLast,
        rois.const_data_ptr<T>(),
        bins);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (channels_last) {
    return sums.to(grad.scalar_type());
  }
  at::Tensor output = at::empty(map_size, grad.options().memory_format(at::MemoryFormat::Contiguous));
  transpose(
      output.mutable_data_ptr<scalar_t>(), sums.const_data_ptr<T>(), map_size[0], map_size[2] * map_size[3], map_size[1]);
  return output;
}

// Adds to what `bins` names.
template <typename scalar_t, typename T, typename Bins>
void pool_grad_weights(
    const at::Tensor& grad_any, const at::Tensor& features, const at::Tensor& rois_any, const Bins& bins) {
  const c10::cuda::CUDAGuard guard(features.device());
  const at::Tensor grad = grad_any.contiguous(format_of(grad_any));
  const at::Tensor rois = values_of<T>(rois_any);
  if (grad.numel() == 0) {
    return;
  }
  const at::Tensor map_tensor = with_channels_last<scalar_t>(features);
  const DeviceMap<const scalar_t> map(map_tensor.const_data_ptr<scalar_t>(), map_tensor);
  with_vectors(map, [&](auto n) {
    grad_weights_kernel<n.value><<<
        grid_size(block_count(rois.size(0), bins.args)), block_threads, 0, at::cuda::getCurrentCUDAStream()>>>(
        grad.const_data_ptr<scalar_t>(),
        format_of(grad) == at::MemoryFormat::ChannelsLast,
        map,
        rois.const_data_ptr<T>(),
        bins);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace projects

// Maps with the channels of a pixel side by side, on the GPU.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>

#include <cstdint>
#include <limits>

namespace projects {

inline int grid_size(int64_t blocks) {
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too many RoIs or pixels for one launch: ", blocks, " blocks");
  return static_cast<int>(blocks);
}

constexpr int tile = 32, tile_rows = 8;

// to[b][j][i] = from[b][i][j] through a tile in shared memory, so that both sides are read and written in lines.
template <typename to_t, typename from_t>
__global__ void transpose_kernel(to_t* to, const from_t* from, int64_t size_i, int64_t size_j) {
  __shared__ from_t shared[tile][tile + 1];
  const int64_t tiles_i = (size_i + tile - 1) / tile, tiles_j = (size_j + tile - 1) / tile;
  const int64_t batch = blockIdx.x / (tiles_i * tiles_j), within = blockIdx.x % (tiles_i * tiles_j);
  const int64_t i0 = within / tiles_j * tile, j0 = within % tiles_j * tile;
  from += batch * size_i * size_j;
  to += batch * size_i * size_j;
  for (int row = threadIdx.y; row < tile; row += tile_rows) {
    const int64_t i = i0 + row, j = j0 + threadIdx.x;
    if (i < size_i && j < size_j) {
      shared[row][threadIdx.x] = from[i * size_j + j];
    }
  }
  __syncthreads();
  for (int row = threadIdx.y; row < tile; row += tile_rows) {
    const int64_t i = i0 + threadIdx.x, j = j0 + row;
    if (i < size_i && j < size_j) {
      to[j * size_i + i] = static_cast<to_t>(shared[threadIdx.x][row]);
    }
  }
}

// Dense (batch, size_i, size_j) to dense (batch, size_j, size_i), converting the type.
template <typename to_t, typename from_t>
void transpose(to_t* to, const from_t* from, int64_t batch, int64_t size_i, int64_t size_j) {
  const int64_t blocks = batch * ((size_i + tile - 1) / tile) * ((size_j + tile - 1) / tile);
  if (blocks > 0) {
    transpose_kernel<<<grid_size(blocks), dim3(tile, tile_rows), 0, at::cuda::getCurrentCUDAStream()>>>(
        to, from, size_i, size_j);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// `features` with the channels of a pixel side by side: itself where it lies so (channels_last, and slices of it), or a copy.
template <typename scalar_t>
at::Tensor with_channels_last(const at::Tensor& features) {
  if (features.size(1) == 1 || features.stride(1) == 1) {
    return features;
  }
  if (!features.is_contiguous()) {
    return features.contiguous(at::MemoryFormat::ChannelsLast);
  }
  at::Tensor copy = at::empty_like(features, features.options().memory_format(at::MemoryFormat::ChannelsLast));
  transpose(
      copy.mutable_data_ptr<scalar_t>(),
      features.const_data_ptr<scalar_t>(),
      features.size(0),
      features.size(1),
      features.size(2) * features.size(3));
  return copy;
}

// Strides in elements; the channels are one apart.
template <typename scalar_t>
struct DeviceMap {
  scalar_t* data;
  int64_t images, channels, image_stride, row_stride, column_stride;

  // `tensor` lies as with_channels_last gives it.
  DeviceMap(scalar_t* data, const at::Tensor& tensor)
      : data(data),
        images(tensor.size(0)),
        channels(tensor.size(1)),
        image_stride(tensor.stride(0)),
        row_stride(tensor.stride(2)),
        column_stride(tensor.stride(3)) {}

  // Whether groups of `n` channels of every pixel can be read at once.
  bool aligned_to(int64_t n) const {
    return channels % n == 0 && image_stride % n == 0 && row_stride % n == 0 && column_stride % n == 0 &&
        reinterpret_cast<std::uintptr_t>(data) % (n * sizeof(scalar_t)) == 0;
  }
};

}  // namespace projects

// The three passes that SgRoIAlign and PrRoIPool share on the CPU. `make_window(r, box)` gives the pixels and weights of
// RoI r (see windows.h).
#pragma once

#include <type_traits>

#include <ATen/OpMathType.h>

#include "../arguments.h"
#include "layout.h"

namespace projects {

template <typename T>
class Rois {
 public:
  Rois(const at::Tensor& rois, int64_t images, const PoolArgs& args)
      : rois_(values_of<T>(rois)), args_(args), image_(rois.size(0)) {
    for (int64_t r = 0; r < size(); ++r) {
      const T image = row(r)[0];
      TORCH_CHECK_INDEX(
          image >= T(0) && image < static_cast<T>(images),
          "the batch index of RoI ", r, " must be in [0, ", images, "), got ", image);
      image_[r] = static_cast<int64_t>(image);
    }
  }

  int64_t size() const {
    return rois_.size(0);
  }
  const std::vector<int64_t>& images() const {
    return image_;
  }
  int64_t image(int64_t r) const {
    return image_[r];
  }
  Box<T> box(int64_t r) const {
    return Box<T>(row(r), args_);
  }

 private:
  const T* row(int64_t r) const {
    return rois_.const_data_ptr<T>() + r * 5;
  }

  at::Tensor rois_;
  const PoolArgs& args_;
  std::vector<int64_t> image_;
};

// The pixels that the RoIs read, as their windows say.
template <typename T, typename MakeWindow>
Footprint footprint(const Rois<T>& rois, int64_t images, int64_t height, const MakeWindow& make_window) {
  std::vector<Bounds> bounds(rois.size());
  at::parallel_for(0, rois.size(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (rois.box(r).finite()) {
        bounds[r] = Bounds(make_window(r, rois.box(r)));
      }
    }
  });
  return Footprint(images, height, rois.images(), bounds);
}

// The numbers of RoI r in a dense (R, channels, rows, columns) tensor with `count` bins, from channel `first` on. (The
// tensor's own strides say nothing where a side has one bin.)
template <typename scalar_t>
Pixels<scalar_t> bins_of(
    scalar_t* data, at::MemoryFormat format, int64_t count, int64_t channels, int64_t r, int64_t first) {
  const bool channels_last = format == at::MemoryFormat::ChannelsLast;
  const int64_t pixel_stride = channels_last ? channels : 1, channel_stride = channels_last ? 1 : count;
  return {data + r * channels * count + first * channel_stride, pixel_stride, channel_stride};
}

// Forward: threads take RoIs.
template <typename scalar_t, typename MakeWindow>
at::Tensor pool_forward(
    const at::Tensor& features, const at::Tensor& rois_tensor, const PoolArgs& args, const MakeWindow& make_window) {
  using T = at::opmath_type<scalar_t>;
  const Rois<T> rois(rois_tensor, features.size(0), args);
  const int64_t channels = features.size(1), count = args.bin_rows * args.bin_cols;
  const at::MemoryFormat format = format_of(features);
  at::Tensor output =
      at::empty({rois.size(), channels, args.bin_rows, args.bin_cols}, features.options().memory_format(format));
  if (output.numel() == 0) {
    return output;
  }
  ChannelsLastMap<scalar_t> map(
      features, [&] { return footprint(rois, features.size(0), args.height, make_window); });
  scalar_t* output_data = output.mutable_data_ptr<scalar_t>();
  map.for_blocks([&](int64_t first, int64_t n) {
    at::parallel_for(0, rois.size(), 1, [&](int64_t begin, int64_t end) {
      Taps<T> taps;
      std::vector<T> bins(count * n);
      for (int64_t r = begin; r < end; ++r) {
        if (rois.box(r).finite()) {
          list_taps(make_window(r, rois.box(r)), args, map.rows(rois.image(r)), map.column_stride(), &taps);
          gather(bins.data(), map.data(), taps, n);
        } else {
          std::fill(bins.begin(), bins.end(), T(0));
        }
        copy_pixels<scalar_t, T>(
            bins_of(output_data, format, count, channels, r, first), {bins.data(), n, 1}, count, n);
      }
    });
  });
  return output;
}

// Gradient of the map: threads take blocks of channels of one image and add its RoIs in order, so that no two threads
// write to one number and the result does not depend on how many there are.
template <typename scalar_t, typename MakeWindow>
at::Tensor pool_grad_features(
    const at::Tensor& grad_output,
    const at::Tensor& rois_tensor,
    at::IntArrayRef map_size,
    bool channels_last,
    const PoolArgs& args,
    const MakeWindow& make_window) {
  using T = at::opmath_type<scalar_t>;
  const Rois<T> rois(rois_tensor, map_size[0], args);
  const at::MemoryFormat grad_format = format_of(grad_output);
  const at::Tensor grad = grad_output.contiguous(grad_format);
  const int64_t images = map_size[0], channels = map_size[1], count = args.bin_rows * args.bin_cols;
  const int64_t block = std::min<int64_t>(channels, 64);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor output = at::empty(map_size, grad.options().memory_format(format)).zero_();
  if (output.numel() == 0 || rois.size() == 0) {
    return output;
  }
  const scalar_t* grad_data = grad.const_data_ptr<scalar_t>();
  scalar_t* output_data = output.mutable_data_ptr<scalar_t>();
  const Footprint read = footprint(rois, images, args.height, make_window);
  const int64_t blocks = (channels + block - 1) / block;
  const int64_t tasks = images * blocks, threads = std::min<int64_t>(at::get_num_threads(), tasks);
  // A block of sums per thread, allocated here: what the threads allocate stays in pools of theirs.
  const int64_t sums_size = read.most_pixels() * block;
  const at::Tensor all_sums = at::empty({threads, sums_size}, grad.options().dtype(c10::CppTypeToScalarType<T>::value));
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    T* sums = all_sums.mutable_data_ptr<T>() + at::get_thread_num() * sums_size;
    std::vector<T> bins(count * block);
    std::vector<int64_t> rows(args.height);
    Taps<T> taps;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, first = task % blocks * block, n = std::min(block, channels - first);
      const int64_t pixel0 = read.first_pixel(image);
      std::fill_n(sums, (read.first_pixel(image + 1) - pixel0) * n, T(0));
      for (int64_t y = 0; y < args.height; ++y) {
        rows[y] = (read.row(image, y) - pixel0) * n;
      }
      for (int64_t r = 0; r < rois.size(); ++r) {
        if (rois.image(r) == image && rois.box(r).finite()) {
          list_taps(make_window(r, rois.box(r)), args, rows.data(), n, &taps);
          copy_pixels<T, scalar_t>(
              {bins.data(), n, 1}, bins_of(grad_data, grad_format, count, channels, r, first), count, n);
          scatter(sums, bins.data(), taps, n);
        }
      }
      scalar_t* block_data = output_data + image * output.stride(0) + first * output.stride(1);
      read.for_rows(image * args.height, (image + 1) * args.height, [&](int64_t, int64_t y, int64_t x, int64_t columns) {
        copy_pixels<scalar_t, T>(
            {block_data + y * output.stride(2) + x * output.stride(3), output.stride(3), output.stride(1)},
            {sums + rows[y] + x * n, n, 1},
            columns,
            n);
      });
    }
  });
  return output;
}

// Gradient of what the windows depend on: threads take RoIs. `add_gradient(r, window, i, j, by_weight)` gets,
// block of channels by block, the derivative of the loss by each weight of bin (i, j) of RoI r.
template <typename scalar_t, typename MakeWindow, typename AddGradient>
void pool_grad_windows(
    const at::Tensor& grad_output,
    const at::Tensor& features,
    const at::Tensor& rois_tensor,
    const PoolArgs& args,
    const MakeWindow& make_window,
    const AddGradient& add_gradient) {
  using T = at::opmath_type<scalar_t>;
  const Rois<T> rois(rois_tensor, features.size(0), args);
  const at::MemoryFormat grad_format = format_of(grad_output);
  const at::Tensor grad = grad_output.contiguous(grad_format);
  const int64_t channels = features.size(1), count = args.bin_rows * args.bin_cols;
  ChannelsLastMap<scalar_t> map(
      features, [&] { return footprint(rois, features.size(0), args.height, make_window); });
  const scalar_t* grad_data = grad.const_data_ptr<scalar_t>();
  map.for_blocks([&](int64_t first, int64_t n) {
    at::parallel_for(0, rois.size(), 1, [&](int64_t begin, int64_t end) {
      Taps<T> taps;
      std::vector<T> bins(count * n), by_weight;
      for (int64_t r = begin; r < end; ++r) {
        if (!rois.box(r).finite()) {
          continue;
        }
        const auto window = make_window(r, rois.box(r));
        list_taps(window, args, map.rows(rois.image(r)), map.column_stride(), &taps);
        copy_pixels<T, scalar_t>(
            {bins.data(), n, 1}, bins_of(grad_data, grad_format, count, channels, r, first), count, n);
        by_weight.resize(taps.weight.size());
        dots(by_weight.data(), map.data(), bins.data(), taps, n);
        for (int64_t b = 0; b < count; ++b) {
          add_gradient(r, window, b / args.bin_cols, b % args.bin_cols, by_weight.data() + taps.begin[b]);
        }
      }
    });
  });
}

}  // namespace projects

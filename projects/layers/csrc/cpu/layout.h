// Maps with the channels of a pixel side by side, copied where necessary and no further than the RoIs read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "windows.h"

namespace projects {

// Pixels x channels numbers inside a tensor of either layout; strides in elements.
template <typename T>
struct Pixels {
  T* data;
  int64_t pixel_stride, channel_stride;
};

// Copies pixel by pixel, channel by channel, in blocks that stay in the first-level cache, converting the type.
template <typename to_t, typename from_t>
inline void copy_pixels(Pixels<to_t> to, Pixels<const from_t> from, int64_t pixels, int64_t channels) {
  if (to.channel_stride != 1) {  // then pixels are the contiguous side: change the roles
    std::swap(to.pixel_stride, to.channel_stride);
    std::swap(from.pixel_stride, from.channel_stride);
    std::swap(pixels, channels);
  }
  if (from.channel_stride == 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      std::copy_n(from.data + p * from.pixel_stride, channels, to.data + p * to.pixel_stride);
    }
    return;
  }
  constexpr int64_t block = 16;
  for (int64_t c0 = 0; c0 < channels; c0 += block) {
    const int64_t c1 = std::min(c0 + block, channels);
    for (int64_t p0 = 0; p0 < pixels; p0 += block) {
      const int64_t p1 = std::min(p0 + block, pixels);
      for (int64_t p = p0; p < p1; ++p) {
        for (int64_t c = c0; c < c1; ++c) {
          to.data[p * to.pixel_stride + c] =
              static_cast<to_t>(from.data[p * from.pixel_stride + c * from.channel_stride]);
        }
      }
    }
  }
}

// The rows and columns of the map that a window reads.
struct Bounds {
  int64_t y0 = 0, y1 = 0, x0 = 0, x1 = 0;  // y1, x1 exclusive

  Bounds() = default;

  template <typename Window>
  explicit Bounds(const Window& window) {
    if (!window.y.pixel.empty() && !window.x.pixel.empty()) {
      const auto y = std::minmax_element(window.y.pixel.begin(), window.y.pixel.end());
      const auto x = std::minmax_element(window.x.pixel.begin(), window.x.pixel.end());
      y0 = *y.first, y1 = *y.second + 1, x0 = *x.first, x1 = *x.second + 1;
    }
  }
};

// The part of the maps that the RoIs read: of each row of each image, the columns from the first to the last in use. A
// packed copy holds these, row after row, image after image, and nothing else.
class Footprint {
 public:
  Footprint(int64_t images, int64_t height, const std::vector<int64_t>& image_of, const std::vector<Bounds>& bounds)
      : height_(height), spans_(images * height), rows_(images * height), first_pixel_(images + 1, 0) {
    for (size_t r = 0; r < bounds.size(); ++r) {
      for (int64_t y = bounds[r].y0; y < bounds[r].y1; ++y) {
        Span& span = spans_[image_of[r] * height + y];
        span.first = span.empty() ? bounds[r].x0 : std::min(span.first, bounds[r].x0);
        span.last = std::max(span.last, bounds[r].x1);
      }
    }
    int64_t pixels = 0;
    for (int64_t row = 0; row < images * height; ++row) {
      rows_[row] = pixels - spans_[row].first;
      pixels += spans_[row].last - spans_[row].first;
      first_pixel_[row / height + 1] = pixels;
    }
  }

  // The packed pixels of the image that has most.
  int64_t most_pixels() const {
    int64_t most = 0;
    for (size_t n = 0; n + 1 < first_pixel_.size(); ++n) {
      most = std::max(most, first_pixel_[n + 1] - first_pixel_[n]);
    }
    return most;
  }

  // Pixel (n, y, x) is the row(n, y) + x th of the packed pixels.
  int64_t row(int64_t n, int64_t y) const {
    return rows_[n * height_ + y];
  }
  // Image n has the packed pixels first_pixel(n) to first_pixel(n + 1) - 1.
  int64_t first_pixel(int64_t n) const {
    return first_pixel_[n];
  }

  // visit(n, y, first column, number of columns) for rows `begin` to `end` - 1 of all images' rows.
  template <typename Visit>
  void for_rows(int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t row = begin; row < end; ++row) {
      if (!spans_[row].empty()) {
        visit(row / height_, row % height_, spans_[row].first, spans_[row].last - spans_[row].first);
      }
    }
  }

 private:
  struct Span {
    int64_t first = 0, last = 0;
    bool empty() const {
      return first == last;
    }
  };
  int64_t height_;
  std::vector<Span> spans_;
  std::vector<int64_t> rows_, first_pixel_;
};

// Maps as the channel loops read them: the channels of a pixel side by side. Where the tensor lies so (channels_last, and
// slices of it) it is read in place, all channels at a time; else a packed copy of up to 64 channels at a time is made: a
// quarter of the memory of a copy of 256, and faster, since the first touch of fresh memory costs more than the copy.
template <typename scalar_t>
class ChannelsLastMap {
 public:
  template <typename MakeFootprint>
  ChannelsLastMap(const at::Tensor& features, const MakeFootprint& make_footprint)
      : features_(features), rows_(features.size(0) * features.size(2)) {
    if (features.size(1) == 1 || features.stride(1) == 1) {
      block_ = features.size(1);
      column_stride_ = features.stride(3);
      for_all_rows([&](int64_t n, int64_t y) { return n * features.stride(0) + y * features.stride(2); });
      data_ = features.const_data_ptr<scalar_t>();
    } else {
      block_ = column_stride_ = std::min<int64_t>(features.size(1), 64);
      footprint_.emplace(make_footprint());
      for_all_rows([&](int64_t n, int64_t y) { return footprint_->row(n, y) * block_; });
      packed_ = at::empty({footprint_->first_pixel(features.size(0)) * block_}, features.options());
    }
  }

  // visit(first, n) for the blocks of channels in turn, while data() holds channels `first` to `first + n - 1`.
  template <typename Visit>
  void for_blocks(const Visit& visit) {
    const int64_t channels = features_.size(1);
    for (int64_t first = 0; first < channels; first += block_) {
      const int64_t n = std::min(block_, channels - first);
      if (footprint_.has_value()) {
        pack(first, n);
      }
      visit(first, n);
    }
  }

  const scalar_t* data() const {
    return data_;
  }
  // Offsets of the rows of image n, and from column to column, in elements from data().
  const int64_t* rows(int64_t n) const {
    return rows_.data() + n * features_.size(2);
  }
  int64_t column_stride() const {
    return column_stride_;
  }

 private:
  template <typename Offset>
  void for_all_rows(const Offset& offset) {
    for (int64_t row = 0; row < static_cast<int64_t>(rows_.size()); ++row) {
      rows_[row] = offset(row / features_.size(2), row % features_.size(2));
    }
  }

  void pack(int64_t first, int64_t n) {
    const auto from = features_.strides();
    const scalar_t* from_data = features_.const_data_ptr<scalar_t>() + first * from[1];
    scalar_t* packed = packed_.mutable_data_ptr<scalar_t>();
    const int64_t rows = static_cast<int64_t>(rows_.size());
    // A thread is worth waking for 2^16 numbers.
    const int64_t grain = std::max<int64_t>(1, (rows << 16) / std::max<int64_t>(1, packed_.numel()));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      footprint_->for_rows(begin, end, [&](int64_t image, int64_t y, int64_t x, int64_t columns) {
        copy_pixels<scalar_t, scalar_t>(
            {packed + (footprint_->row(image, y) + x) * block_, block_, 1},
            {from_data + image * from[0] + y * from[2] + x * from[3], from[3], from[1]},
            columns,
            n);
      });
    });
    data_ = packed;
  }

  const at::Tensor& features_;
  const scalar_t* data_ = nullptr;
  int64_t block_, column_stride_;
  std::vector<int64_t> rows_;
  std::optional<Footprint> footprint_;
  at::Tensor packed_;
};

}  // namespace projects

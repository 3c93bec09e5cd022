// The pixels under the bins of one RoI and their weights, on the CPU.
//
// Sample points of a bin often share pixels, so each axis lists every pixel of a bin once, and the weights are added up
// per pixel before any channel is touched. The gradient goes the same way back: the channel loops give one number per
// pixel of a bin (the derivative of the loss by that pixel's weight), from which the gradients to the probability map or
// to the box follow.
#pragma once

#include <algorithm>
#include <vector>

#include "../geometry.h"
#include "channels.h"

namespace projects {

// The pixels of one axis, bin by bin: bin k has pixel[begin[k]] to pixel[begin[k + 1] - 1].
struct AxisPixels {
  std::vector<int64_t> pixel, begin;

  int64_t count(int64_t k) const {
    return begin[k + 1] - begin[k];
  }
  const int64_t* of(int64_t k) const {
    return pixel.data() + begin[k];
  }
};

// SgRoIAlign. The weight of a pixel is the sum over the bin's points of (1 + p) * share of y * share of x / points.
template <typename T>
class SampledWindow {
 public:
  AxisPixels y, x;

  // `prob` holds the probability maps of all RoIs, of which this is the r-th, or is null for p = 0.
  SampledWindow(const PoolArgs& args, const Box<T>& box, const T* prob, int64_t r)
      : args_(args), prob_(prob == nullptr ? nullptr : prob + r * args.prob_height * args.prob_width) {
    const SampledAxis<T> y_axis(box.y0, box.y1, args.bin_rows, args.height, args);
    const SampledAxis<T> x_axis(box.x0, box.x1, args.bin_cols, args.width, args);
    fill(y_axis, args.prob_height, &y, &y_points_);
    fill(x_axis, args.prob_width, &x, &x_points_);
    share_ = T(1) / (static_cast<T>(std::max<int64_t>(y_axis.grid, 1)) * static_cast<T>(std::max<int64_t>(x_axis.grid, 1)));
  }

  // Adds to weight[row][column], over the pixels of bin (i, j).
  void add_weights(int64_t i, int64_t j, T* weight) const {
    const int64_t width = x.count(j);
    for_points(i, j, [&](const Point& py, const Point& px) {
      const T scale = prob_ == nullptr ? share_ : share_ * (T(1) + interpolate(py.cells, px.cells));
      T *low = weight + py.low * width, *high = weight + py.high * width;
      low[px.low] += scale * py.low_weight * px.low_weight;
      low[px.high] += scale * py.low_weight * px.high_weight;
      high[px.low] += scale * py.high_weight * px.low_weight;
      high[px.high] += scale * py.high_weight * px.high_weight;
    });
  }

  // Adds to the gradient of the probability map, given the gradient of the weights of bin (i, j).
  void add_gradient(int64_t i, int64_t j, const T* grad, T* grad_prob) const {
    const int64_t width = x.count(j);
    for_points(i, j, [&](const Point& py, const Point& px) {
      const T *low = grad + py.low * width, *high = grad + py.high * width;
      const T by_p = share_ *
          (py.low_weight * (px.low_weight * low[px.low] + px.high_weight * low[px.high]) +
           py.high_weight * (px.low_weight * high[px.low] + px.high_weight * high[px.high]));
      T* low_cells = grad_prob + py.cells.low * args_.prob_width;
      T* high_cells = grad_prob + py.cells.high * args_.prob_width;
      low_cells[px.cells.low] += by_p * py.cells.low_weight * px.cells.low_weight;
      low_cells[px.cells.high] += by_p * py.cells.low_weight * px.cells.high_weight;
      high_cells[px.cells.low] += by_p * py.cells.high_weight * px.cells.low_weight;
      high_cells[px.cells.high] += by_p * py.cells.high_weight * px.cells.high_weight;
    });
  }

 private:
  // A sample point on one axis: its two pixels as places in the bin's list, and its two cells of the probability map.
  struct Point {
    int64_t low, high;
    T low_weight, high_weight;
    Neighbours<T> cells;
  };
  struct Points {
    std::vector<Point> point;
    std::vector<int64_t> begin;
  };

  void fill(const SampledAxis<T>& axis, int64_t cells, AxisPixels* pixels, Points* points) const {
    pixels->begin.push_back(0);
    points->begin.push_back(0);
    for (int64_t k = 0; k < axis.bins; ++k) {
      for (int64_t sample = axis.first_sample(k), last = axis.last_sample(k); sample < last; ++sample) {
        const Neighbours<T> at = axis.pixels(k, sample);
        if (!at.outside()) {
          const int64_t low = place(at.low, pixels), high = place(at.high, pixels);
          points->point.push_back({low, high, at.low_weight, at.high_weight, {0, 0, T(0), T(0)}});
          if (prob_ != nullptr) {
            points->point.back().cells = axis.cells(k, sample, cells);
          }
        }
      }
      pixels->begin.push_back(static_cast<int64_t>(pixels->pixel.size()));
      points->begin.push_back(static_cast<int64_t>(points->point.size()));
    }
  }

  // Where `pixel` stands in the last bin's list, to which it is added if it is not among the last two there: points come
  // in order, so that it cannot stand further up unless the box is inverted (and then listing it twice does no harm).
  static int64_t place(int64_t pixel, AxisPixels* pixels) {
    const int64_t first = pixels->begin.back(), size = static_cast<int64_t>(pixels->pixel.size());
    for (int64_t i = size - 1; i >= std::max(first, size - 2); --i) {
      if (pixels->pixel[i] == pixel) {
        return i - first;
      }
    }
    pixels->pixel.push_back(pixel);
    return size - first;
  }

  T interpolate(const Neighbours<T>& cy, const Neighbours<T>& cx) const {
    const T *low = prob_ + cy.low * args_.prob_width, *high = prob_ + cy.high * args_.prob_width;
    return cy.low_weight * (cx.low_weight * low[cx.low] + cx.high_weight * low[cx.high]) +
        cy.high_weight * (cx.low_weight * high[cx.low] + cx.high_weight * high[cx.high]);
  }

  template <typename Visit>
  void for_points(int64_t i, int64_t j, const Visit& visit) const {
    for (int64_t m = y_points_.begin[i]; m < y_points_.begin[i + 1]; ++m) {
      for (int64_t n = x_points_.begin[j]; n < x_points_.begin[j + 1]; ++n) {
        visit(y_points_.point[m], x_points_.point[n]);
      }
    }
  }

  const PoolArgs& args_;
  const T* prob_;
  T share_;
  Points y_points_, x_points_;
};

// PrRoIPool. The weight of a pixel is the product of its weights on the two axes.
template <typename T>
class IntegratedWindow {
 public:
  AxisPixels y, x;

  IntegratedWindow(const PoolArgs& args, const Box<T>& box) {
    fill(IntegratedAxis<T>(box.y0, box.y1, args.bin_rows, args.height), &y, &y_pixels_);
    fill(IntegratedAxis<T>(box.x0, box.x1, args.bin_cols, args.width), &x, &x_pixels_);
  }

  void add_weights(int64_t i, int64_t j, T* weight) const {
    const Pixel *py = y_pixels_.data() + y.begin[i], *px = x_pixels_.data() + x.begin[j];
    for (int64_t m = 0; m < y.count(i); ++m) {
      for (int64_t n = 0; n < x.count(j); ++n) {
        *weight++ += py[m].weight * px[n].weight;
      }
    }
  }

  // Adds to the gradient of (x0, y0, x1, y1) in feature pixels, given the gradient of the weights of bin (i, j).
  void add_gradient(int64_t i, int64_t j, const T* grad, T* grad_box) const {
    const Pixel *py = y_pixels_.data() + y.begin[i], *px = x_pixels_.data() + x.begin[j];
    for (int64_t m = 0; m < y.count(i); ++m) {
      for (int64_t n = 0; n < x.count(j); ++n) {
        const T by_weight = *grad++;
        grad_box[0] += by_weight * py[m].weight * px[n].by_start;
        grad_box[1] += by_weight * py[m].by_start * px[n].weight;
        grad_box[2] += by_weight * py[m].weight * px[n].by_end;
        grad_box[3] += by_weight * py[m].by_end * px[n].weight;
      }
    }
  }

 private:
  // The weight of a pixel on one axis, and its derivatives by the ends of the RoI.
  struct Pixel {
    T weight, by_start, by_end;
  };

  static void fill(const IntegratedAxis<T>& axis, AxisPixels* pixels, std::vector<Pixel>* weights) {
    pixels->begin.push_back(0);
    for (int64_t k = 0; k < axis.bins; ++k) {
      for (int64_t i = axis.first_pixel(k), last = axis.last_pixel(k); i < last; ++i) {
        pixels->pixel.push_back(i);
        weights->push_back({axis.weight(k, i), axis.weight_by_start(k, i), axis.weight_by_end(k, i)});
      }
      pixels->begin.push_back(static_cast<int64_t>(pixels->pixel.size()));
    }
  }

  std::vector<Pixel> y_pixels_, x_pixels_;
};

// Lists the taps of all bins in `taps`; row y of the map starts at offset rows[y].
template <typename Window, typename T>
void list_taps(const Window& window, const PoolArgs& args, const int64_t* rows, int64_t column_stride, Taps<T>* taps) {
  taps->begin.assign(1, 0);
  taps->offset.clear();
  taps->weight.clear();
  for (int64_t i = 0; i < args.bin_rows; ++i) {
    for (int64_t j = 0; j < args.bin_cols; ++j) {
      for (int64_t m = 0; m < window.y.count(i); ++m) {
        for (int64_t n = 0; n < window.x.count(j); ++n) {
          taps->offset.push_back(rows[window.y.of(i)[m]] + window.x.of(j)[n] * column_stride);
        }
      }
      taps->weight.resize(taps->offset.size(), T(0));
      window.add_weights(i, j, taps->weight.data() + taps->begin.back());
      taps->begin.push_back(static_cast<int64_t>(taps->offset.size()));
    }
  }
}

}  // namespace projects

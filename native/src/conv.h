// Geometry of a direct convolution: output pixels as positions in one line, and the panel of input
// in which every weight is a constant shift of those positions.
//
// Along an axis, input index o * stride + k * dilation - before belongs to output o under weight k.
// The input is held as copies: copy m has x[t * stride + residue(m) - before] at place t, so weight
// k reads copy k % copies at place o + shift(k). Folded: one copy for every residue of k * dilation
// modulo the stride, and shifts. Unrolled: one copy for every k, and no shifts.
// Static functions only: an inline one would be a weak symbol in every ISA file.
#pragma once
#include <stdint.h>

namespace prunus {

struct Axis {
  int64_t in, out, kernel, stride, dilation, before;  // before: zeros before the first element
  bool unrolled;
  int64_t period, copies, shift;  // shift: the largest one
  int64_t extent;                 // places from one image or line to the next
};

struct Conv {
  int64_t batch, channels, groups;
  Axis down, across;
  int64_t panels;     // kernel panels that are filled at once
  int64_t length;     // floats of one copy of one channel in them
  int64_t positions;  // of all images
  bool far;           // the input does not stay in the caches between two calls
};

static inline int64_t conv_copies(const Conv& c) { return c.down.copies * c.across.copies; }
static inline int64_t conv_pixels(const Conv& c) { return c.down.out * c.across.out; }

static inline int64_t residue(const Axis& axis, int64_t copy) {
  return axis.unrolled ? copy * axis.dilation : copy * axis.dilation % axis.stride;
}
static inline int64_t shift_of(const Axis& axis, int64_t k) {
  return axis.unrolled ? 0 : k * axis.dilation / axis.stride;
}

// a / b rounded up, b > 0; 0 for negative a.
static inline int64_t conv_ceil(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

static inline void finish_axis(Axis& axis, bool unrolled) {
  int64_t a = axis.stride, b = axis.dilation;
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  axis.unrolled = unrolled;
  axis.period = unrolled ? axis.kernel : axis.stride / a;
  axis.copies = axis.kernel < axis.period ? axis.kernel : axis.period;
  axis.shift = shift_of(axis, axis.kernel - 1);
  // The zeros behind one line are the zeros before the next.
  int64_t overlap = axis.shift;
  for (int64_t m = 0; m < axis.copies; ++m) {
    const int64_t gap = axis.before - residue(axis, m);
    const int64_t lead = conv_ceil(gap, axis.stride);
    const int64_t tail = axis.out + axis.shift - conv_ceil(axis.in + gap, axis.stride);
    if (lead < overlap) overlap = lead;
    if (tail < overlap) overlap = tail > 0 ? tail : 0;
  }
  axis.extent = axis.out + axis.shift - overlap;
}

// An odd number of cache lines, so that the channels spread over all of a cache's sets.
static inline int64_t conv_length(const Conv& c, int64_t panel) {
  const int64_t reach = c.down.shift * c.across.extent + c.across.shift;
  return (c.panels * panel + reach + 15) / 16 * 16 | 16;
}

static inline int64_t conv_positions(const Conv& c) {
  const int64_t lines = (c.batch - 1) * c.down.extent + c.down.out;
  return c.batch == 0 ? 0 : (lines - 1) * c.across.extent + c.across.out;
}

// A convolution that is done one group and image at a time: the base describes that.
struct GroupConv : Conv {
  int64_t images, all_groups;
};

// A run of `count` places of a panel: from `from` floats into a channel on, or zeros (from < 0).
struct Run {
  int64_t from;
  int32_t at, count;
};

// Upper bounds of the runs of a panel, in and out.
static inline int64_t conv_runs_in(const Conv& c) {
  return conv_copies(c) * 3 * (c.length / c.across.extent + 2);
}
static inline int64_t conv_runs_out(const Conv& c, int64_t panel) {
  return panel / c.across.extent + 2;
}

}  // namespace prunus

// Where the integer convolution finds its input.
//
// There is no im2col. An output pixel's reduction is a list of taps, each the address of a run of input
// bytes: a pixel's channels in x itself, or a row of the level `zero` outside of the image. Where the
// channels of a group are no multiple of four the rows that a chunk of pixels needs are copied first, with
// zeros for the missing channels and the padding at both sides; then a row of the kernel, if it is not
// dilated, is one run.
#pragma once

#include <vector>

#include "integer_layout.h"
#include "scratch.h"

namespace adq {

// Pixels of a chunk whose taps are the same ones.
struct PixelGroup {
    std::vector<int> taps;
    int first;  // in the chunk's order of pixels
    int count;
};

// Some consecutive output pixels, counted over all images, in an order that puts groups together.
struct Chunk {
    std::vector<PixelGroup> groups;
    std::vector<std::int32_t> places;         // of each pixel, from the chunk's first one on
    std::vector<const std::uint8_t*> inputs;  // [taps][pixels]; those that a pixel's group has
};

// If level 0 lies outside of the image, taps there add nothing: pixels with the same kernel rows and columns
// inside form a group that has only these. Small groups, and everything otherwise, share one with all taps.
class Taps {
 public:
    Taps(const Convolution& args, const Layout& layout);

    // Pixels begin .. end; `rows` keeps the copied input, if there is one.
    void find(std::int64_t begin, std::int64_t end, Scratch& rows, Chunk& chunk) const;

 private:
    // Kernel rows or columns that lie inside of the image.
    struct Range {
        int first, end;
        bool operator==(const Range& other) const { return first == other.first && end == other.end; }
    };
    // The output positions along an axis, by the range that they have.
    struct Axis {
        std::vector<Range> kinds;
        std::vector<int> kind;  // of each position
        std::vector<int> end;   // of the run of positions of the same kind
    };
    // Rows of the input, counted over all images, from `first` on.
    struct Rows {
        const std::uint8_t* data;
        std::int64_t first;
    };

    Axis find_axis(int axis, std::int64_t positions, std::int64_t size, bool skip) const;
    template <class Function>
    void for_runs(std::int64_t begin, std::int64_t end, const Function& function) const;
    std::vector<int> find_groups(std::int64_t begin, std::int64_t end, Chunk& chunk) const;
    void find_run(const Rows& rows, std::int64_t row, std::int64_t first, std::int64_t last,
                  const std::vector<int>& taps, std::int64_t stride, const std::uint8_t** to) const;
    void find_tap(const std::uint8_t* line, std::int64_t first, std::int64_t last, std::int64_t offset,
                  const std::uint8_t** to) const;
    std::int64_t image_row(std::int64_t row, std::int64_t k) const;
    std::int64_t input_row(std::int64_t row, std::int64_t k) const;
    Rows copy_rows(std::int64_t begin, std::int64_t end, Scratch& scratch) const;
    void copy_row(std::int64_t row, std::uint8_t* to) const;

    const Convolution& args_;
    const Layout& layout_;
    std::vector<std::uint8_t> outside_;  // a tap outside of the image
    Axis rows_, columns_;
};

}  // namespace adq

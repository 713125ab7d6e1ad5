// Where the integer convolution finds its input.
//
// There is no im2col. The taps of an output pixel lie in x itself, at the same distances from each other for
// all pixels; consecutive ones are one run of input bytes. What reaches beyond the image is left out where
// level 0 lies there, which adds nothing: pixels with the same kernel rows and columns inside of the image
// form a group. Otherwise, and where too few pixels are alike, their inputs are copied.
//
// Where the channels of a group are no multiple of four the rows that a chunk of pixels needs are copied
// first, with zeros for the missing channels and the padding at both sides.
#pragma once

#include <vector>

#include "integer_layout.h"
#include "scratch.h"

namespace adq {

// Pixels of a chunk that have the same runs.
struct PixelGroup {
    std::vector<Run> runs;
    int first;  // in the chunk's order of pixels
    int count;
};

// Some consecutive output pixels, counted over all images, in an order that puts groups together.
struct Chunk {
    std::vector<PixelGroup> groups;
    int copied;                                // pixels of the last group, if their input is copied
    std::vector<std::int32_t> places;          // of each pixel, from the chunk's first one on
    std::vector<const std::uint8_t*> origins;  // of each pixel: where its first tap is, or would be
    Scratch rows, patches;                     // copied input
};

class Taps {
 public:
    Taps(const Convolution& args, const Layout& layout);

    // Finds pixels begin .. end.
    void find(std::int64_t begin, std::int64_t end, Chunk& chunk) const;

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

    Axis find_axis(int axis, std::int64_t positions, std::int64_t size, std::int64_t margin) const;
    std::vector<Run> find_runs(Range rows, Range columns, std::int64_t row_bytes,
                               std::int64_t column_bytes) const;
    std::vector<int> find_groups(std::int64_t begin, std::int64_t end, Chunk& chunk) const;
    template <class Function>
    void for_pieces(std::int64_t begin, std::int64_t end, const Function& function) const;
    void copy_patch(const Rows& rows, std::int64_t row, std::int64_t column, std::uint8_t* to) const;
    std::int64_t image_row(std::int64_t row, std::int64_t k) const;
    std::int64_t input_row(std::int64_t row, std::int64_t k) const;
    Rows copy_rows(std::int64_t begin, std::int64_t end, Scratch& scratch) const;
    void copy_row(std::int64_t row, std::uint8_t* to) const;

    const Convolution& args_;
    const Layout& layout_;
    const std::int64_t row_bytes_;
    std::vector<std::uint8_t> outside_;  // a pixel outside of the image
    Axis rows_, columns_;
};

}  // namespace adq

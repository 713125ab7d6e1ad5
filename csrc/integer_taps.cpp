#include "integer_taps.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace adq {
namespace {

constexpr int kSmallGroup = 4;  // pixels that fill no tile
constexpr int kCopied = -1;

}  // namespace

Taps::Taps(const Convolution& args, const Layout& layout)
    : args_(args), layout_(layout), row_bytes_(layout.columns * layout.pixel), outside_(layout.pixel, 0) {
    for (std::int64_t i = 0; i < layout.groups; ++i)
        std::fill_n(outside_.begin() + i * layout.unit, layout.inputs, args.zero);
    rows_ = find_axis(0, args.out_height, args.height, 0);
    columns_ = find_axis(1, args.out_width, layout.columns, layout.margin);
}

Taps::Axis Taps::find_axis(int axis, std::int64_t positions, std::int64_t size, std::int64_t margin) const {
    Axis out;
    for (std::int64_t i = 0; i < positions; ++i) {
        Range range{0, static_cast<int>(args_.kernel[axis])};
        const auto inside = [&](int tap) {
            const std::int64_t at = i * args_.stride[axis] - args_.padding[axis] + margin;
            return at + tap * args_.dilation[axis] >= 0 && at + tap * args_.dilation[axis] < size;
        };
        while (range.first < range.end && !inside(range.first)) ++range.first;
        while (range.first < range.end && !inside(range.end - 1)) --range.end;
        const auto found = std::find(out.kinds.begin(), out.kinds.end(), range);
        out.kind.push_back(static_cast<int>(found - out.kinds.begin()));
        if (found == out.kinds.end()) out.kinds.push_back(range);
    }
    out.end.assign(positions, static_cast<int>(positions));
    for (std::int64_t i = positions - 2; i >= 0; --i)
        out.end[i] = out.kind[i] == out.kind[i + 1] ? out.end[i + 1] : static_cast<int>(i + 1);
    return out;
}

// The taps of some kernel rows and columns that lie `row_bytes` and `column_bytes` apart.
std::vector<Run> Taps::find_runs(Range rows, Range columns, std::int64_t row_bytes,
                                 std::int64_t column_bytes) const {
    std::vector<Run> runs;
    const std::int64_t bytes = kBlockInputs * layout_.run;
    for (int k = rows.first; k < rows.end; ++k) {
        for (int l = columns.first; l < columns.end; ++l) {
            const std::int64_t step = (k * args_.kernel[1] + l) * layout_.run;
            const std::int64_t offset = k * row_bytes + l * column_bytes;
            const bool joins = !layout_.depthwise && l > columns.first && column_bytes == bytes;
            if (joins)
                runs.back().steps += layout_.run;
            else
                runs.push_back({step, layout_.run, offset});
        }
    }
    while (layout_.depthwise && runs.size() % kBlockInputs != 0) runs.push_back(runs.back());
    return runs;
}

// Calls function(row, first, last, kind) for the pieces of rows whose columns are of one kind.
template <class Function>
void Taps::for_pieces(std::int64_t begin, std::int64_t end, const Function& function) const {
    const std::int64_t width = args_.out_width;
    const int kinds = static_cast<int>(columns_.kinds.size());
    for (std::int64_t at = begin; at < end;) {
        const std::int64_t row = at / width, first = at % width;
        const std::int64_t last = std::min<std::int64_t>(columns_.end[first], first + end - at);
        function(row, first, last, rows_.kind[row % args_.out_height] * kinds + columns_.kind[first]);
        at += last - first;
    }
}

// The group of each kind of pixels, or kCopied.
std::vector<int> Taps::find_groups(std::int64_t begin, std::int64_t end, Chunk& chunk) const {
    const std::size_t columns = columns_.kinds.size();
    std::vector<int> count(rows_.kinds.size() * columns), group(count.size(), kCopied);
    for_pieces(begin, end, [&](std::int64_t, std::int64_t first, std::int64_t last, int kind) {
        count[kind] += static_cast<int>(last - first);
    });
    const Range all[] = {{0, static_cast<int>(args_.kernel[0])}, {0, static_cast<int>(args_.kernel[1])}};
    const bool skips = args_.zero == 0 && !layout_.depthwise;
    chunk.groups.clear();
    int first = 0;
    chunk.copied = 0;
    for (std::size_t kind = 0; kind < count.size(); ++kind) {
        const Range rows = rows_.kinds[kind / columns], inside = columns_.kinds[kind % columns];
        const bool whole = rows == all[0] && inside == all[1];
        if (!whole && !(skips && count[kind] > kSmallGroup)) {
            chunk.copied += count[kind];
        } else if (count[kind] > 0) {
            group[kind] = static_cast<int>(chunk.groups.size());
            chunk.groups.push_back(
                {find_runs(rows, inside, args_.dilation[0] * row_bytes_, args_.dilation[1] * layout_.pixel),
                 first, count[kind]});
            first += count[kind];
        }
    }
    if (chunk.copied > 0)
        chunk.groups.push_back(
            {find_runs(all[0], all[1], args_.kernel[1] * layout_.pixel, layout_.pixel), first, chunk.copied});
    return group;
}

void Taps::find(std::int64_t begin, std::int64_t end, Chunk& chunk) const {
    const Rows rows = layout_.copied ? copy_rows(begin, end, chunk.rows) : Rows{args_.x, 0};
    const std::vector<int> group = find_groups(begin, end, chunk);
    chunk.places.resize(end - begin);
    chunk.origins.resize(end - begin);
    std::vector<int> next;
    for (const PixelGroup& each : chunk.groups) next.push_back(each.first);
    const std::int64_t patch_bytes = args_.kernel[0] * args_.kernel[1] * layout_.pixel;
    std::uint8_t* patch = chunk.patches.reserve(chunk.copied * patch_bytes);
    std::int32_t place = 0;
    for_pieces(begin, end, [&](std::int64_t row, std::int64_t first, std::int64_t last, int kind) {
        const bool copied = group[kind] == kCopied;
        int& to = copied ? next.back() : next[group[kind]];
        const std::int64_t step = args_.stride[1] * layout_.pixel;
        const std::int64_t y = row / args_.out_height * args_.height + image_row(row, 0) - rows.first;
        const std::uint8_t* origin =
            rows.data + y * row_bytes_ + first * step - (args_.padding[1] - layout_.margin) * layout_.pixel;
        for (std::int64_t i = first; i < last; ++i, ++to, origin += step) {
            chunk.places[to] = place++;
            chunk.origins[to] = copied ? patch : origin;
            if (!copied) continue;
            copy_patch(rows, row, i, patch);
            patch += patch_bytes;
        }
    });
}

// All taps of a pixel.
void Taps::copy_patch(const Rows& rows, std::int64_t row, std::int64_t column, std::uint8_t* to) const {
    for (std::int64_t k = 0; k < args_.kernel[0]; ++k) {
        const std::int64_t y = image_row(row, k);
        const std::uint8_t* line = rows.data + (input_row(row, k) - rows.first) * row_bytes_;
        for (std::int64_t l = 0; l < args_.kernel[1]; ++l, to += layout_.pixel) {
            const std::int64_t x =
                column * args_.stride[1] + l * args_.dilation[1] + layout_.margin - args_.padding[1];
            const bool inside = y >= 0 && y < args_.height && x >= 0 && x < layout_.columns;
            std::memcpy(to, inside ? line + x * layout_.pixel : outside_.data(), layout_.pixel);
        }
    }
}

// The row of its image that kernel row `k` reads for output row `row`; it may lie outside.
std::int64_t Taps::image_row(std::int64_t row, std::int64_t k) const {
    return row % args_.out_height * args_.stride[0] - args_.padding[0] + k * args_.dilation[0];
}

// The same, clamped to the image, counted over all images.
std::int64_t Taps::input_row(std::int64_t row, std::int64_t k) const {
    const std::int64_t y = std::min(std::max<std::int64_t>(image_row(row, k), 0), args_.height - 1);
    return row / args_.out_height * args_.height + y;
}

// Copies the rows that pixels begin .. end need.
Taps::Rows Taps::copy_rows(std::int64_t begin, std::int64_t end, Scratch& scratch) const {
    const std::int64_t first = input_row(begin / args_.out_width, 0);
    const std::int64_t last = input_row((end - 1) / args_.out_width, args_.kernel[0] - 1);
    std::uint8_t* rows = scratch.reserve((last + 1 - first) * row_bytes_);
    std::memset(rows, 0, (last + 1 - first) * row_bytes_);
    for (std::int64_t row = first; row <= last; ++row) copy_row(row, rows + (row - first) * row_bytes_);
    return {rows, first};
}

void Taps::copy_row(std::int64_t row, std::uint8_t* to) const {
    const std::uint8_t* from = args_.x + row * args_.width * args_.channels;
    for (std::int64_t i = 0; i < layout_.margin; ++i) {
        std::memcpy(to + i * layout_.pixel, outside_.data(), layout_.pixel);
        std::memcpy(to + (layout_.columns - 1 - i) * layout_.pixel, outside_.data(), layout_.pixel);
    }
    to += layout_.margin * layout_.pixel;
    const std::int64_t units = args_.width * layout_.groups, unit = layout_.unit, inputs = layout_.inputs;
    if (inputs == 3 && unit == 4) {
        for (std::int64_t i = 0; i < units; ++i) std::memcpy(to + 4 * i, from + 3 * i, 3);
        return;
    }
    for (std::int64_t i = 0; i < units; ++i) std::memcpy(to + i * unit, from + i * inputs, inputs);
}

}  // namespace adq

#include "integer_taps.h"

#include <algorithm>
#include <cstring>

namespace adq {
namespace {

constexpr int kSmallGroup = 4;  // pixels that fill no tile

}  // namespace

Taps::Taps(const Convolution& args, const Layout& layout) : args_(args), layout_(layout) {
    const std::int64_t units = layout.groups * (layout.merged ? args.kernel[1] : 1);
    outside_.assign(units * layout.unit, 0);
    for (std::int64_t i = 0; i < units; ++i)
        std::fill_n(outside_.begin() + i * layout.unit, layout.inputs, args.zero);
    const bool skip = args.zero == 0 && !layout.depthwise;
    rows_ = find_axis(0, args.out_height, args.height, skip);
    columns_ = find_axis(1, args.out_width, args.width, skip && !layout.merged);
}

Taps::Axis Taps::find_axis(int axis, std::int64_t positions, std::int64_t size, bool skip) const {
    Axis out;
    const int taps = static_cast<int>(layout_.kernel[axis]);
    for (std::int64_t i = 0; i < positions; ++i) {
        Range range{0, taps};
        const std::int64_t at = i * args_.stride[axis] - args_.padding[axis];
        const auto inside = [&](int k) {
            return at + k * args_.dilation[axis] >= 0 && at + k * args_.dilation[axis] < size;
        };
        while (skip && range.first < range.end && !inside(range.first)) ++range.first;
        while (skip && range.first < range.end && !inside(range.end - 1)) --range.end;
        const auto found = std::find(out.kinds.begin(), out.kinds.end(), range);
        out.kind.push_back(static_cast<int>(found - out.kinds.begin()));
        if (found == out.kinds.end()) out.kinds.push_back(range);
    }
    out.end.assign(positions, static_cast<int>(positions));
    for (std::int64_t i = positions - 2; i >= 0; --i) {
        if (out.kind[i] != out.kind[i + 1])
            out.end[i] = static_cast<int>(i + 1);
        else
            out.end[i] = out.end[i + 1];
    }
    return out;
}

// Calls function(row, first, last, kind) for the runs of columns of one kind.
template <class Function>
void Taps::for_runs(std::int64_t begin, std::int64_t end, const Function& function) const {
    const std::int64_t width = args_.out_width;
    const int kinds = static_cast<int>(columns_.kinds.size());
    for (std::int64_t at = begin; at < end;) {
        const std::int64_t row = at / width, first = at % width;
        const std::int64_t last = std::min<std::int64_t>(columns_.end[first], first + end - at);
        function(row, first, last, rows_.kind[row % args_.out_height] * kinds + columns_.kind[first]);
        at += last - first;
    }
}

// The group of each kind of pixels.
std::vector<int> Taps::find_groups(std::int64_t begin, std::int64_t end, Chunk& chunk) const {
    const std::size_t columns = columns_.kinds.size();
    std::vector<int> count(rows_.kinds.size() * columns), group(count.size());
    for_runs(begin, end, [&](std::int64_t, std::int64_t first, std::int64_t last, int kind) {
        count[kind] += static_cast<int>(last - first);
    });
    chunk.groups.clear();
    int small = 0, first = 0;
    for (std::size_t kind = 0; kind < count.size(); ++kind) {
        if (count[kind] <= kSmallGroup) {
            small += count[kind];
            group[kind] = -1;
            continue;
        }
        const Range rows = rows_.kinds[kind / columns], inside = columns_.kinds[kind % columns];
        PixelGroup own{{}, first, count[kind]};
        for (int k = rows.first; k < rows.end; ++k) {
            for (int l = inside.first; l < inside.end; ++l)
                own.taps.push_back(static_cast<int>(k * layout_.kernel[1] + l));
        }
        group[kind] = static_cast<int>(chunk.groups.size());
        chunk.groups.push_back(std::move(own));
        first += count[kind];
    }
    if (small == 0) return group;
    PixelGroup rest{{}, first, small};
    for (int tap = 0; tap < layout_.taps(); ++tap) rest.taps.push_back(tap);
    std::replace(group.begin(), group.end(), -1, static_cast<int>(chunk.groups.size()));
    chunk.groups.push_back(std::move(rest));
    return group;
}

void Taps::find(std::int64_t begin, std::int64_t end, Scratch& scratch, Chunk& chunk) const {
    const Rows rows = layout_.copied ? copy_rows(begin, end, scratch) : Rows{args_.x, 0};
    const std::vector<int> group = find_groups(begin, end, chunk);
    chunk.places.resize(end - begin);
    chunk.inputs.resize(layout_.taps() * (end - begin));
    std::vector<int> next;
    for (const PixelGroup& each : chunk.groups) next.push_back(each.first);
    std::int64_t place = 0;
    for_runs(begin, end, [&](std::int64_t row, std::int64_t first, std::int64_t last, int kind) {
        int& to = next[group[kind]];
        find_run(rows, row, first, last, chunk.groups[group[kind]].taps, end - begin,
                 chunk.inputs.data() + to);
        for (std::int64_t i = first; i < last; ++i) chunk.places[to++] = static_cast<std::int32_t>(place++);
    });
}

// Taps of the columns first .. last of a row: to[tap * stride].
void Taps::find_run(const Rows& rows, std::int64_t row, std::int64_t first, std::int64_t last,
                    const std::vector<int>& taps, std::int64_t stride, const std::uint8_t** to) const {
    for (const int tap : taps) {
        const std::int64_t k = tap / layout_.kernel[1], l = tap % layout_.kernel[1];
        const std::int64_t y = image_row(row, k);
        const bool inside = y >= 0 && y < args_.height;
        const std::uint8_t* line =
            inside ? rows.data + (input_row(row, k) - rows.first) * layout_.columns * layout_.pixel : nullptr;
        find_tap(line, first, last, l * args_.dilation[1], to + tap * stride);
    }
}

// A tap `offset` columns into the kernel; the line is null outside of the image.
void Taps::find_tap(const std::uint8_t* line, std::int64_t first, std::int64_t last, std::int64_t offset,
                    const std::uint8_t** to) const {
    const std::int64_t shift = offset + layout_.margin - args_.padding[1], stride = args_.stride[1];
    if (line == nullptr) {
        std::fill_n(to, last - first, outside_.data());
        return;
    }
    // The first output column whose tap is input column `column` or a later one.
    const auto reach = [&](std::int64_t column) {
        return std::min(std::max(column > shift ? divide_up(column - shift, stride) : 0, first), last);
    };
    const std::int64_t begin = reach(0), end = reach(layout_.columns);
    to = std::fill_n(to, begin - first, outside_.data());
    const std::uint8_t* at = line + (begin * stride + shift) * layout_.pixel;
    for (std::int64_t i = begin; i < end; ++i, at += stride * layout_.pixel) *to++ = at;
    std::fill_n(to, last - end, outside_.data());
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
    const std::int64_t bytes = layout_.columns * layout_.pixel;
    std::uint8_t* rows = scratch.reserve((last + 1 - first) * bytes);
    std::memset(rows, 0, (last + 1 - first) * bytes);
    for (std::int64_t row = first; row <= last; ++row) copy_row(row, rows + (row - first) * bytes);
    return {rows, first};
}

void Taps::copy_row(std::int64_t row, std::uint8_t* to) const {
    const std::uint8_t* from = args_.x + row * args_.width * args_.channels;
    const auto copy = [&](std::int64_t column) { std::memcpy(to + column, outside_.data(), layout_.unit); };
    for (std::int64_t i = 0; i < layout_.margin * layout_.groups; ++i) {
        copy(i * layout_.unit);
        copy((layout_.columns * layout_.groups - 1 - i) * layout_.unit);
    }
    to += layout_.margin * layout_.pixel;
    if (layout_.inputs == 3 && layout_.unit == 4) {
        for (std::int64_t i = 0; i < args_.width * layout_.groups; ++i)
            std::memcpy(to + 4 * i, from + 3 * i, 3);
        return;
    }
    for (std::int64_t i = 0; i < args_.width * layout_.groups; ++i) {
        std::memcpy(to + i * layout_.unit, from + i * layout_.inputs, layout_.inputs);
    }
}

}  // namespace adq

// Search in an ascending table: the cell of u is #{j : u > edge[j]}. NaN lies above no edge: cell 0.
//
// find(u) gives the cell in the form that pick(table, u, found) takes to read a table, and number(found)
// makes it the cell's number. Where the instruction set permutes, it is a walk down a binary tree in
// registers, and beyond their capacity in memory; elsewhere up to 16 cells are a chain of compares and
// selects.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace adq {
namespace ADQ_ISA {

// A table in memory; pick(index) is table[index modulo kCells].
template <int kCells>
struct MemoryTable {
    const float* value;
    explicit ADQ_INLINE MemoryTable(const float* table) : value(table) {}
    ADQ_INLINE Floats pick(Ints index) const { return gather(value, index & (kCells - 1)); }
};

// The child of a tree's node that u belongs to: the second one if it lies above the node's edge.
ADQ_INLINE Ints child(Ints node, Floats u, Floats edge) {
    return add_where(node + node, greater(u, edge), fill(1));
}

#if ADQ_HAS_PERMUTE

template <int kCells>
using CellTable = typename std::conditional<(kCells <= kMaxRegisterTable), RegisterTable<kCells>,
                                            MemoryTable<kCells>>::type;

// Levels kLevel .. kEnd - 1 of the tree, each in a table of its own.
template <int kLevel, int kEnd>
struct Tree {
    const CellTable<(1 << kLevel)> edges;
    const Tree<kLevel + 1, kEnd> below;

    explicit ADQ_INLINE Tree(const float* heap) : edges(heap + (1 << kLevel)), below(heap) {}
    ADQ_INLINE Ints walk(Floats u, Ints node) const {
        return below.walk(u, child(node, u, edges.pick(node)));
    }
};

template <int kEnd>
struct Tree<kEnd, kEnd> {
    explicit ADQ_INLINE Tree(const float*) {}
    ADQ_INLINE Ints walk(Floats, Ints node) const { return node; }
};

constexpr int log2(int power) { return power == 1 ? 0 : 1 + log2(power / 2); }

// As many cells as a register holds: the walk numbers them as it goes. Before it adds `half`, the number is a
// multiple of 2 half, and the edge that decides is sorted[number + half - 1].
template <int kCells, bool kRegister = (kCells <= kWidth)>
class Cells {
 public:
    static constexpr int kSize = kCells;
    using Table = CellTable<kCells>;

    explicit ADQ_INLINE Cells(const EdgeTable& edges) : root_(fill(edges.sorted[kCells / 2 - 1])) {
        unroll<kBelow>([&](auto i) ADQ_INLINE_LAMBDA {
            below_[i.value] = load_floats(edges.sorted + half_at(i.value) - 1);
        });
    }

    ADQ_INLINE Ints find(Floats u) const {
        Ints cell = add_where(fill(0), greater(u, root_), fill(kCells / 2));
        unroll<kBelow>([&](auto i) ADQ_INLINE_LAMBDA {
            const Floats edge = permute(below_[i.value], cell);
            cell = add_where(cell, greater(u, edge), fill(half_at(i.value)));
        });
        return cell;
    }

    ADQ_INLINE Ints number(Ints cell) const { return cell; }
    ADQ_INLINE Floats pick(const Table& table, Floats, Ints cell) const { return table.pick(cell); }

 private:
    static constexpr int kBelow = log2(kCells) - 1;
    static constexpr int half_at(int level) { return kCells >> (level + 2); }

    const Floats root_;
    Floats below_[kBelow];
};

// The first kWidth nodes, which are levels 0 .. log2(kWidth) - 1, share one register.
template <int kCells>
class Cells<kCells, false> {
 public:
    static constexpr int kSize = kCells;
    using Table = CellTable<kCells>;

    explicit ADQ_INLINE Cells(const EdgeTable& edges)
        : root_(fill(edges.heap[1])), top_(edges.heap), bottom_(edges.heap) {}

    ADQ_INLINE Ints find(Floats u) const {
        Ints node = add_where(fill(2), greater(u, root_), fill(1));
        unroll<kTopLevels - 1>([&](auto) ADQ_INLINE_LAMBDA { node = child(node, u, top_.pick(node)); });
        return bottom_.walk(u, node);
    }

    ADQ_INLINE Ints number(Ints node) const { return node - kCells; }
    ADQ_INLINE Floats pick(const Table& table, Floats, Ints node) const { return table.pick(node); }

 private:
    static constexpr int kLevels = log2(kCells);
    static constexpr int kTopLevels = kLevels < log2(kWidth) ? kLevels : log2(kWidth);

    const Floats root_;
    const RegisterTable<kWidth> top_;
    const Tree<kTopLevels, kLevels> bottom_;
};

#else

// The chain compares with every edge, once for all that is picked: the compiler shares the masks.
template <int kCells, bool kChain = (kCells <= 16)>
class Cells {
 public:
    static constexpr int kSize = kCells;

    struct Table {
        Floats value[kCells];
        explicit ADQ_INLINE Table(const float* table) {
            unroll<kCells>([&](auto k) ADQ_INLINE_LAMBDA { value[k.value] = fill(table[k.value]); });
        }
    };

    explicit ADQ_INLINE Cells(const EdgeTable& edges) {
        unroll<kCells - 1>([&](auto j) ADQ_INLINE_LAMBDA { edge_[j.value] = fill(edges.sorted[j.value]); });
    }

    ADQ_INLINE Ints find(Floats u) const {
        Ints cell = fill(0);
        unroll<kCells - 1>(
            [&](auto j) ADQ_INLINE_LAMBDA { cell = add_where(cell, greater(u, edge_[j.value]), fill(1)); });
        return cell;
    }

    ADQ_INLINE Ints number(Ints cell) const { return cell; }

    ADQ_INLINE Floats pick(const Table& table, Floats u, Ints) const {
        Floats out = table.value[0];
        unroll<kCells - 1>([&](auto j) ADQ_INLINE_LAMBDA {
            out = select(greater(u, edge_[j.value]), table.value[j.value + 1], out);
        });
        return out;
    }

 private:
    Floats edge_[kCells - 1];
};

// More cells are searched in memory, lane by lane, the lanes side by side.
template <int kCells>
class Cells<kCells, false> {
 public:
    static constexpr int kSize = kCells;
    using Table = MemoryTable<kCells>;

    explicit Cells(const EdgeTable& edges) : heap_(edges.heap) {}

    ADQ_INLINE Ints find(Floats u) const {
        std::int32_t nodes[kWidth];
        float value[kWidth];
        unroll<kWidth>([&](auto i) ADQ_INLINE_LAMBDA {
            nodes[i.value] = 1;
            value[i.value] = u[i.value];
        });
        for (int level = 1; level < kCells; level *= 2) {
            unroll<kWidth>([&](auto i) ADQ_INLINE_LAMBDA {
                const std::int32_t above = value[i.value] > heap_[nodes[i.value]] ? 1 : 0;
                nodes[i.value] = 2 * nodes[i.value] + above;
            });
        }
        Ints node{};
        unroll<kWidth>([&](auto i) ADQ_INLINE_LAMBDA { node[i.value] = nodes[i.value]; });
        return node;
    }

    ADQ_INLINE Ints number(Ints node) const { return node - kCells; }
    ADQ_INLINE Floats pick(const Table& table, Floats, Ints node) const { return table.pick(node); }

 private:
    const float* heap_;
};

#endif

// One cell, whatever u is.
class SingleCell {
 public:
    static constexpr int kSize = 1;

    struct Table {
        const Floats value;
        explicit ADQ_INLINE Table(const float* table) : value(fill(table[0])) {}
    };

    explicit ADQ_INLINE SingleCell(const EdgeTable&) {}
    ADQ_INLINE Ints find(Floats) const { return fill(0); }
    ADQ_INLINE Ints number(Ints cell) const { return cell; }
    ADQ_INLINE Floats pick(const Table& table, Floats, Ints) const { return table.value; }
};

}  // namespace ADQ_ISA
}  // namespace adq

// Memory that a thread keeps from call to call, aligned to a cache line.
#pragma once

#include <cstdint>
#include <new>

namespace adq {

class Scratch {
 public:
    ~Scratch() { release(); }
    std::uint8_t* reserve(std::int64_t bytes) {
        if (bytes > size_) {
            release();
            data_ = static_cast<std::uint8_t*>(::operator new(static_cast<std::size_t>(bytes), kLine));
            size_ = bytes;
        }
        return data_;
    }

 private:
    static constexpr std::align_val_t kLine{64};
    void release() {
        if (data_ != nullptr) ::operator delete(data_, kLine);
        data_ = nullptr, size_ = 0;
    }
    std::uint8_t* data_ = nullptr;
    std::int64_t size_ = 0;
};

}  // namespace adq

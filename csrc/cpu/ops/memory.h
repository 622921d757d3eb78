// Working memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace madtp::cpu {

// Uninitialised memory, aligned to a cache line. Freed blocks are kept for the next call: up to 64 MiB of those of 256 KiB and more
// (from 2 MiB on in huge pages), since fresh pages from the system cost as much as packing into them; and a few smaller ones in
// every thread.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  template <class T = void>
  T* at(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(data_ + byte_offset);
  }

 private:
  std::byte* data_;
  size_t capacity_;
};

// Large results come from the system each time, page by page as they are written: asks for large pages, a five-hundredth of them.
void expect_large_pages(void* data, int64_t bytes);

}  // namespace madtp::cpu

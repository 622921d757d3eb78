// Memory for work and for results.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>

namespace madtp::cpu {

// Uninitialised memory, aligned to a cache line. Freed blocks are kept for the next call: up to 128 MiB of those of 256 KiB and more
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

// What `at::empty` returns on a CPU, for results: large ones in such memory, which goes back there when nobody has the tensor any more.
// The C library returns much of theirs to the system when a layer is done, and new pages cost a quarter of a pruned model's time.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace madtp::cpu

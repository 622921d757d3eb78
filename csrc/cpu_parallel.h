// Work shared between threads, and memory for it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace madtp::cpu {

// Calls worker(next) in every thread; next() gives the thread its next item, a number >= items when there is none left. Which
// thread takes an item is left to chance (that balances uneven items), so an item must write to a place of its own.
template <class Worker>
void share_items(int64_t items, const Worker& worker) {
  std::atomic<int64_t> taken{0};
  const auto next = [&taken] { return taken.fetch_add(1, std::memory_order_relaxed); };
  const int64_t threads = std::min<int64_t>(items, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { worker(next); });
}

// The same for items that need no memory of their thread.
template <class Item>
void for_each_item(int64_t items, const Item& run) {
  share_items(items, [&](const auto& next) {
    for (int64_t item = next(); item < items; item = next()) run(item);
  });
}

// Uninitialised memory, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}))) {}

  template <class T = void>
  T* at(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(data_.get() + byte_offset);
  }

 private:
  struct Delete {
    void operator()(std::byte* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte[], Delete> data_;
};

}  // namespace madtp::cpu

// Work shared between threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

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

}  // namespace madtp::cpu

#include "torch/device/memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <pthread.h>

#include <atomic>
#include <map>
#include <mutex>
#include <string>

namespace hxcomm::device {
namespace {

MemoryApi table{};
std::atomic<bool> forked{false};
thread_local int thread_chip = 0;
thread_local int kernel_chip = -1;

void report(void* block, int64_t nbytes) {
  const auto chip = static_cast<int>(static_cast<uint64_t>(static_cast<char*>(block) - table.base) / table.nbytes);
  MemoryStatistics s{};
  table.statistics(table.arenas, chip, &s);
  c10::reportMemoryUsageToProfiler(block, nbytes, static_cast<size_t>(s.allocated_bytes.current),
                                   static_cast<size_t>(s.reserved_bytes.current),
                                   c10::Device(kHx, static_cast<c10::DeviceIndex>(chip)));
}

void release(void* block) {
  // A forked child inherits tensors, but not the memory, and perhaps a lock that nobody there will release.
  if (forked.load(std::memory_order_relaxed)) return;
  const size_t nbytes = table.release(table.arenas, block);
  if (C10_UNLIKELY(c10::memoryProfilingEnabled())) report(block, -static_cast<int64_t>(nbytes));
}

std::string in_units(uint64_t nbytes) {
  static constexpr const char* kUnits[] = {" bytes", " KiB", " MiB", " GiB", " TiB"};
  auto value = static_cast<double>(nbytes);
  int unit = 0;
  for (; value >= 1024 && unit < 4; ++unit) value /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f%s" : "%.2f%s", value, kUnits[unit]);
  return text;
}

void check_chip(int chip) {
  TORCH_CHECK(chip >= 0 && chip < table.chips, "there is no hx:", chip, "; this process has ", table.chips,
              " chips (HXCOMM_CHIPS)");
}

[[noreturn]] void out_of_memory(int chip, size_t nbytes) {
  MemoryStatistics s{};
  table.statistics(table.arenas, chip, &s);
  const auto allocated = static_cast<uint64_t>(s.allocated_bytes.current);
  const auto active = static_cast<uint64_t>(s.active_bytes.current);
  TORCH_CHECK_WITH(OutOfMemoryError, false, "hx out of memory. Tried to allocate ", in_units(nbytes), ". hx:", chip,
                   " has a total capacity of ", in_units(table.nbytes), ", of which ", in_units(allocated),
                   " is allocated by tensors, ", in_units(active - allocated), " is kept for peers, and ",
                   in_units(table.nbytes - active),
                   " is free, but not in one piece that is large enough. HXCOMM_HBM sets the capacity.");
  __builtin_unreachable();
}

c10::DataPtr allocate_on(int chip, size_t nbytes, c10::Device label) {
  check_not_forked();
  if (nbytes == 0) return {nullptr, label};
  void* block = table.allocate(table.arenas, chip, nbytes);
  if (C10_UNLIKELY(block == nullptr)) out_of_memory(chip, nbytes);
  if (C10_UNLIKELY(c10::memoryProfilingEnabled())) report(block, static_cast<int64_t>(nbytes));
  return {block, block, &release, label};
}

c10::CachingAllocator::StatArray stat_from(const MemoryCounter& from) {
  c10::CachingAllocator::StatArray stats{};
  auto& all = stats[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
  all.current = from.current;
  all.peak = from.peak;
  all.allocated = from.added;
  all.freed = from.removed;
  return stats;
}

class ChipAllocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    ensure_started();
    const int chip = current_chip();
    return allocate_on(chip, nbytes, c10::Device(kHx, static_cast<c10::DeviceIndex>(chip)));
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    check_not_forked();  // the parent may have allocated since what is free here
    for (int chip = 0; chip < table.chips; ++chip) table.trim(table.arenas, chip);
  }
  // Operations are finished when they return, so a block's last use on any stream is over when it is released.
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex chip) override {
    const MemoryStatistics s = statistics(chip);
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocation = stat_from(s.allocations);
    stats.segment = stat_from(s.segments);
    stats.active = stat_from(s.active);
    stats.allocated_bytes = stat_from(s.allocated_bytes);
    stats.reserved_bytes = stat_from(s.reserved_bytes);
    stats.active_bytes = stat_from(s.active_bytes);
    stats.requested_bytes = stat_from(s.requested_bytes);
    stats.num_ooms = s.ooms;
    stats.num_device_alloc = s.segments.added;
    stats.num_device_free = s.segments.removed;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex chip) override {
    statistics(chip), table.reset_totals(table.arenas, chip);
  }
  void resetPeakStats(c10::DeviceIndex chip) override { statistics(chip), table.reset_peaks(table.arenas, chip); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex chip) override {
    const MemoryStatistics s = statistics(chip);
    return {table.nbytes - static_cast<size_t>(s.active_bytes.current), table.nbytes};
  }

 private:
  static MemoryStatistics statistics(int chip) {
    ensure_started();
    check_chip(chip);
    MemoryStatistics s{};
    table.statistics(table.arenas, chip, &s);
    return s;
  }
};

// torch keeps and hands out pointers to the CPU allocator for good, so this one is never destroyed.
class HostProxy final : public c10::Allocator {
 public:
  explicit HostProxy(c10::Allocator* host) : host_(host) {}
  c10::DataPtr allocate(size_t nbytes) override {
    if (kernel_chip < 0) return host_->allocate(nbytes);
    return allocate_on(kernel_chip, nbytes, c10::Device(c10::DeviceType::CPU));
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_any; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
  c10::Allocator* host() const { return host_; }

 private:
  static void release_any(void* block);
  c10::Allocator* host_;
};

HostProxy* proxy = nullptr;

void HostProxy::release_any(void* block) {
  if (in_chip_memory(block))
    release(block);
  else
    proxy->host()->raw_deallocate(block);
}

// Pinned host memory is ordinary memory whose addresses are known.
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, c10::Device(c10::DeviceType::CPU)};
    void* block = proxy->host()->raw_allocate(nbytes);
    const std::lock_guard lock(mutex_);
    blocks_[static_cast<char*>(block)] = nbytes;
    return {block, block, &release_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
  bool owns(const void* data) {
    const std::lock_guard lock(mutex_);
    const auto* address = static_cast<const char*>(data);
    auto after = blocks_.upper_bound(const_cast<char*>(address));
    return after != blocks_.begin() && address < std::prev(after)->first + std::prev(after)->second;
  }

 private:
  static void release_pinned(void* block);
  std::mutex mutex_;
  std::map<char*, size_t> blocks_;
};

ChipAllocator& chips() {
  static auto* allocator = new ChipAllocator;
  return *allocator;
}

PinnedAllocator& pinned() {
  static auto* allocator = new PinnedAllocator;
  return *allocator;
}

void PinnedAllocator::release_pinned(void* block) {
  {
    const std::lock_guard lock(pinned().mutex_);
    pinned().blocks_.erase(static_cast<char*>(block));
  }
  proxy->host()->raw_deallocate(block);
}

}  // namespace

void prepare_memory() { c10::SetAllocator(kHx, &chips()); }

void start_memory(const MemoryApi& api) {
  table = api;
  proxy = new HostProxy(c10::GetAllocator(c10::DeviceType::CPU));
  pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  c10::SetCPUAllocator(proxy, /*priority=*/100);
}

bool is_started() { return proxy != nullptr; }

const MemoryApi& memory() { return table; }

void check_not_forked() {
  TORCH_CHECK(!forked.load(std::memory_order_relaxed),
              "Cannot use hx in a forked subprocess: the chips' memory is not mapped there. To use hx with "
              "multiprocessing, use the 'spawn' start method; a DataLoader's workers must return CPU tensors");
}

int current_chip() { return thread_chip; }

int exchange_current_chip(int chip) {
  ensure_started();
  check_chip(chip);
  return std::exchange(thread_chip, chip);
}

void set_current_chip(int chip) { exchange_current_chip(chip); }

int exchange_kernel_chip(int chip) { return std::exchange(kernel_chip, chip); }

c10::DeviceAllocator* chip_allocator() { return &chips(); }
c10::Allocator* host_allocator() { return proxy; }
c10::Allocator* pinned_allocator() {
  ensure_started();
  return &pinned();
}
bool is_pinned(const void* data) { return is_started() && pinned().owns(data); }

}  // namespace hxcomm::device

// Relacy's atomics in the shape of std::atomic, for core/line.h: every load may read any value that C++ allows it to.
//
// Each acquire, release and full fence that runs is entered in a list, and one of them at a time can be taken away.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
// Last, and without its macros: it renames the standard's memory orders, assert, new and malloc.
#include <relacy/relacy.hpp>
#undef memory_order_relaxed
#undef memory_order_consume
#undef memory_order_acquire
#undef memory_order_release
#undef memory_order_acq_rel
#undef memory_order_seq_cst
#undef new
#undef delete
#undef malloc
#undef calloc
#undef realloc
#undef free
#undef assert
#undef errno

namespace hxcomm::model {

// One memory order that could be weaker.
struct Weakening {
  const char* part;  // "acquire", "release" or "full fence"
  std::source_location where;

  // "line.h:57, publish: without release"
  std::string text() const {
    const std::string file = where.file_name(), head = where.function_name();
    const std::string name = head.substr(0, head.find('('));
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line()) + ", " +
           name.substr(name.rfind(':') + 1) + ": without " + part;
  }
};

class Weakenings {
 public:
  // Whether this part of this order is taken away at present. Enters it where it is new.
  bool applies(const char* part, const std::source_location& where) {
    size_t i = 0;
    while (i < n_ && (std::strcmp(found_[i].part, part) != 0 || found_[i].where.line() != where.line() ||
                      found_[i].where.column() != where.column() ||
                      std::strcmp(found_[i].where.file_name(), where.file_name()) != 0))
      ++i;
    if (i == n_) found_.at(n_++) = {part, where};
    return i == applied_;
  }
  void apply(size_t index) { applied_ = index; }
  void apply_none() { applied_ = SIZE_MAX; }
  size_t size() const { return n_; }
  const Weakening& operator[](size_t i) const { return found_[i]; }

 private:
  // No vector: inside of a run Relacy owns the heap.
  std::array<Weakening, 64> found_{};
  size_t n_ = 0;
  size_t applied_ = SIZE_MAX;
};
inline Weakenings weakenings;

inline rl::debug_info info_of(const std::source_location& where) {
  return {where.function_name(), where.file_name(), where.line()};
}

inline rl::memory_order order_of(std::memory_order order, const std::source_location& where) {
  RL_VERIFY(order == std::memory_order_relaxed || order == std::memory_order_acquire ||
            order == std::memory_order_release || order == std::memory_order_acq_rel);
  bool acquire = order == std::memory_order_acquire || order == std::memory_order_acq_rel;
  bool release = order == std::memory_order_release || order == std::memory_order_acq_rel;
  if (acquire && weakenings.applies("acquire", where)) acquire = false;
  if (release && weakenings.applies("release", where)) release = false;
  return acquire && release ? rl::mo_acq_rel : acquire ? rl::mo_acquire : release ? rl::mo_release : rl::mo_relaxed;
}

template <class T>
class Atomic {
 public:
  using Where = std::source_location;

  T load(std::memory_order order, const Where& where = Where::current()) const {
    return value_.load(order_of(order, where), info_of(where));
  }
  void store(T value, std::memory_order order, const Where& where = Where::current()) {
    value_.store(value, order_of(order, where), info_of(where));
  }
  T fetch_add(T value, std::memory_order order, const Where& where = Where::current()) {
    return value_.fetch_add(value, order_of(order, where), info_of(where));
  }
  T fetch_sub(T value, std::memory_order order, const Where& where = Where::current()) {
    return value_.fetch_sub(value, order_of(order, where), info_of(where));
  }
  bool compare_exchange_strong(T& expected, T desired, std::memory_order success, std::memory_order failure,
                               const Where& where = Where::current()) {
    return value_.compare_exchange_strong(expected, desired, order_of(success, where), info_of(where),
                                          order_of(failure, where), info_of(where));
  }

  // futex_wait: compares with the newest value and falls asleep in one step.
  void sleep_while(T expected, const Where& where = Where::current()) {
    if (value_.debug_value() == expected) value_.wait(rl::ctx(), false, false, info_of(where));
  }
  void wake_all(const Where& where = Where::current()) { value_.wake(rl::ctx(), kAll, info_of(where)); }

 private:
  static constexpr rl::thread_id_t kAll = 1 << 10;
  rl::atomic<T> value_;
};

// What core/line.h is a template over.
struct RelacyAtomics {
  template <class T>
  using Atomic = model::Atomic<T>;
  static void full_fence(const std::source_location& where = std::source_location::current()) {
    if (!weakenings.applies("full fence", where)) rl::atomic_thread_fence(rl::mo_seq_cst, info_of(where));
  }
  static void wake_all(Atomic<uint32_t>& word) { word.wake_all(); }
};

// Ordinary memory: a read or write that is not ordered with another rank's write is reported as a data race.
class Cell {
 public:
  uint64_t load(const std::source_location& where = std::source_location::current()) const {
    return value_(info_of(where)).load();
  }
  void store(uint64_t value, const std::source_location& where = std::source_location::current()) {
    value_(info_of(where)).store(value);
  }

 private:
  rl::var<uint64_t> value_;
};

}  // namespace hxcomm::model

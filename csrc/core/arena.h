// The memory of one simulated chip: an allocator over a range of this process's segment.
//
// Two-level segregated fit (Masmano et al., "TLSF: a new dynamic memory allocator for real-time systems", 2004): free
// blocks lie in lists by size, 32 to a power of two, so allocating and releasing take constant time however long the
// process has run; neighbours that are free are one block. What it knows of blocks lies in private memory, not beside
// them: a peer that maps the segment cannot spoil it, and freeing touches no page. Only pages that were written cost
// memory; trim() gives those of free blocks back.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace hxcomm {

struct ArenaCounter {
  int64_t current = 0, peak = 0, added = 0, removed = 0;
};

// As CUDA's caching allocator counts. Active is allocated and held; reserved is what may have pages, in pieces of 2
// MiB.
struct ArenaStatistics {
  ArenaCounter allocations, active, segments;                                   // numbers
  ArenaCounter allocated_bytes, active_bytes, reserved_bytes, requested_bytes;  // bytes
  int64_t ooms = 0;
};

class Arena {
 public:
  static constexpr size_t kAlignment = 256;          // as cudaMalloc promises
  static constexpr size_t kPiece = size_t{2} << 20;  // what reserved memory is counted and given back in

  // Over [offset, offset + nbytes) of the file `fd`, mapped at `base`. nbytes is a multiple of kPiece.
  Arena(int fd, size_t offset, std::byte* base, size_t nbytes);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* base() const { return base_; }
  size_t nbytes() const { return nbytes_; }

  // Called without locks before memory is said to be short, and by trim(): what it releases counts. Set before use.
  void on_shortage(std::function<void()> reclaim) { reclaim_ = std::move(reclaim); }

  // nullptr when no free range is large enough, and for nbytes 0. Contents are what was there before. Thread-safe.
  void* allocate(size_t nbytes);
  // `block` is what allocate() returned. While anybody holds, the block stays active and is reused only later. Returns
  // the bytes that were asked for.
  size_t release(void* block);

  // Blocks that are released after hold() are kept until unhold() of the token, so a peer may go on reading them.
  uint64_t hold();
  void unhold(uint64_t token);

  // Gives the pages of free memory back to the kernel. Returns the bytes given back.
  size_t trim();

  ArenaStatistics statistics() const;
  void reset_peaks();
  void reset_totals();
  size_t largest_free() const;
  // For tests: walks all blocks and says what is inconsistent, or "".
  const char* inconsistency() const;

 private:
  using Index = uint32_t;  // of a block; sizes and offsets below count granules of kAlignment
  static constexpr Index kNone = 0xffffffff;
  static constexpr unsigned kSubBits = 5, kSubs = 1u << kSubBits, kLevels = 33 - kSubBits;

  enum class State : uint8_t { unused, free, allocated, held };
  struct Block {
    uint32_t offset = 0, size = 0;
    Index before = kNone, after = kNone;   // neighbours in memory
    Index previous = kNone, next = kNone;  // of the same list, when free
    uint64_t requested = 0;
    State state = State::unused;
  };
  struct Held {
    Index block;
    uint64_t last_token;  // of those who held when it was released
  };
  struct Class {
    unsigned level, sub;
  };

  void* try_allocate(size_t nbytes);
  static Class class_of(uint32_t size);
  Index make_block();
  void insert_free(Index block);
  void remove_free(Index block);
  Index find(uint32_t size) const;
  Index split(Index block, uint32_t size);
  void free_block(Index block);
  void reserve(const Block& block);
  void drop_held();

  const int fd_;
  const size_t offset_;
  std::byte* const base_;
  const size_t nbytes_;
  std::function<void()> reclaim_;
  mutable std::mutex mutex_;
  std::vector<Block> blocks_;
  std::vector<Index> spare_;  // entries of blocks_ that are unused
  // Offset in granules -> block + 1, where an allocated block begins. Sparse: zero pages cost nothing.
  std::unique_ptr<Index[], void (*)(void*)> starts_;
  uint32_t levels_ = 0;  // bit per level that has a free block
  std::array<uint32_t, kLevels> subs_{};
  std::array<std::array<Index, kSubs>, kLevels> lists_;
  std::vector<bool> reserved_;  // by piece
  std::deque<Held> held_;
  std::set<uint64_t> holders_;
  uint64_t last_token_ = 0;
  ArenaStatistics statistics_;
};

// The chips of this process, one arena each, one behind the other in its segment.
class Arenas {
 public:
  Arenas(int fd, size_t offset, std::byte* base, int chips, size_t bytes_per_chip);

  int chips() const { return static_cast<int>(arenas_.size()); }
  size_t bytes_per_chip() const { return bytes_per_chip_; }
  std::byte* base() const { return base_; }
  Arena& of_chip(int chip) { return *arenas_.at(static_cast<size_t>(chip)); }
  void on_shortage(const std::function<void()>& reclaim) {
    for (const auto& arena : arenas_) arena->on_shortage(reclaim);
  }
  // The chip whose memory holds the whole range, or -1.
  int chip_of(const void* data, size_t nbytes = 0) const;
  // Where a range lies in the segment, as peers address it; -1 when it lies in no arena.
  int64_t segment_offset(const void* data, size_t nbytes) const;

 private:
  const size_t offset_;
  std::byte* const base_;
  const size_t bytes_per_chip_;
  std::vector<std::unique_ptr<Arena>> arenas_;
};

}  // namespace hxcomm

// Unit test of a chip's memory: its allocator, what it keeps for peers, its statistics, and a million random steps.
#include "core/arena.h"

#include <sys/stat.h>

#include <cstring>
#include <map>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "core/segment.h"
#include "tests/expect.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr uint8_t kNonce[16] = {1};

// A segment with arenas behind its control region.
struct Chips {
  Segment segment;
  Arenas arenas;
  explicit Chips(size_t nbytes, int chips = 1)
      : segment(kMiB, kNonce, nbytes * static_cast<size_t>(chips)),
        arenas(segment.fd(), segment.control_bytes(), segment.base() + segment.control_bytes(), chips, nbytes) {}
  Arena& operator*() { return arenas.of_chip(0); }
  size_t committed_bytes() const {
    struct stat info{};
    fstat(segment.fd(), &info);
    return static_cast<size_t>(info.st_blocks) * 512;
  }
};

void a_block_is_aligned_and_overlaps_no_other() {
  Chips chips(64 * kMiB);
  std::map<std::byte*, size_t> blocks;
  for (size_t nbytes : {size_t{1}, size_t{255}, size_t{256}, size_t{257}, kMiB, 3 * kMiB + 1}) {
    auto* block = static_cast<std::byte*>((*chips).allocate(nbytes));
    expect(reinterpret_cast<uintptr_t>(block) % Arena::kAlignment == 0, "alignment");
    blocks[block] = nbytes;
  }
  std::byte* end = (*chips).base();
  for (const auto& [block, nbytes] : blocks) {
    expect(block >= end, "no overlap");
    end = block + nbytes;
  }
  expect(end <= (*chips).base() + 64 * kMiB, "inside the arena");
}

void what_is_released_is_the_next_of_its_size() {
  Chips chips(64 * kMiB);
  (*chips).allocate(1000);
  void* block = (*chips).allocate(5000);
  (*chips).allocate(1000);
  (*chips).release(block);
  expect((*chips).allocate(5000) == block, "the same memory, still in the cache");
}

void releases_leave_one_free_range() {
  Chips chips(64 * kMiB);
  std::vector<void*> blocks;
  for (size_t i = 0; i < 100; ++i) blocks.push_back((*chips).allocate(1000 * (i + 1)));
  for (size_t i = 0; i < 100; ++i) (*chips).release(blocks[i * 37 % 100]);
  expect((*chips).largest_free() == 64 * kMiB, "all of it in one piece");
  expect((*chips).allocate(64 * kMiB) == (*chips).base(), "all of it in one block");
}

void what_can_be_reclaimed_is_not_missing() {
  Chips chips(4 * kMiB);
  void* kept = (*chips).allocate(3 * kMiB);
  int calls = 0;
  chips.arenas.on_shortage([&] {
    ++calls;
    (*chips).release(std::exchange(kept, nullptr));
  });
  expect((*chips).allocate(kMiB) != nullptr && calls == 0, "nobody is asked while there is memory");
  expect((*chips).allocate(3 * kMiB) != nullptr && calls == 1, "memory that was given back in time");
  expect((*chips).statistics().ooms == 0, "no refusal");
  expect((*chips).allocate(kMiB) == nullptr && calls == 2, "asked once, then refused");
  expect((*chips).statistics().ooms == 1, "one refusal");
  (*chips).trim();
  expect(calls == 3, "trim asks, too");
}

void a_full_arena_returns_nothing_and_counts_it() {
  Chips chips(4 * kMiB);
  void* block = (*chips).allocate(3 * kMiB);
  expect((*chips).allocate(2 * kMiB) == nullptr, "no memory");
  expect((*chips).allocate(5 * kMiB) == nullptr, "more than there is at all");
  expect((*chips).allocate(~size_t{0} - 10) == nullptr, "a size that would overflow");
  expect((*chips).statistics().ooms == 3, "three refusals counted");
  (*chips).release(block);
  expect((*chips).allocate(4 * kMiB) != nullptr, "all of it after the release");
}

void a_range_that_just_fits_is_found_in_its_own_class() {
  Chips chips(16 * kMiB);
  void* block = (*chips).allocate(10 * kMiB + 256);
  (*chips).allocate(6 * kMiB - 256);
  (*chips).release(block);
  expect((*chips).allocate(10 * kMiB + 256) == block, "the only range there is");
}

void what_is_released_while_held_is_kept() {
  Chips chips(64 * kMiB);
  void* block = (*chips).allocate(kMiB);
  const uint64_t early = (*chips).hold();
  const uint64_t late = (*chips).hold();
  (*chips).release(block);
  const uint64_t later_still = (*chips).hold();
  expect((*chips).statistics().allocated_bytes.current == 0, "not allocated");
  expect((*chips).statistics().active_bytes.current == static_cast<int64_t>(kMiB), "but active");
  (*chips).unhold(early);
  expect((*chips).allocate(64 * kMiB) == nullptr, "kept for the second");
  (*chips).unhold(late);
  expect((*chips).statistics().active_bytes.current == 0, "free: who came later does not count");
  (*chips).unhold(later_still);
  expect((*chips).allocate(64 * kMiB) != nullptr, "all of it");
}

void trimmed_memory_costs_nothing_and_what_is_in_use_stays() {
  Chips chips(64 * kMiB);
  const size_t before = chips.committed_bytes();
  void* kept = (*chips).allocate(1000);
  void* large = (*chips).allocate(32 * kMiB);
  std::memset(kept, 7, 1000);
  std::memset(large, 7, 32 * kMiB);
  (*chips).release(large);
  expect((*chips).trim() == 32 * kMiB, "16 pieces given back");
  expect(chips.committed_bytes() <= before + 2 * kMiB, "their pages, too");
  expect((*chips).statistics().reserved_bytes.current == static_cast<int64_t>(2 * kMiB), "one piece reserved");
  expect(static_cast<char*>(kept)[999] == 7, "what is in use untouched");
  expect((*chips).trim() == 0, "nothing more to give back");
}

void statistics_are_those_of_cuda() {
  Chips chips(64 * kMiB);
  void* a = (*chips).allocate(100);
  void* b = (*chips).allocate(1000);
  (*chips).release(a);
  const ArenaStatistics s = (*chips).statistics();
  expect(s.allocations.current == 1 && s.allocations.peak == 2 && s.allocations.added == 2, "numbers");
  expect(s.allocated_bytes.current == 1024 && s.allocated_bytes.peak == 1280, "bytes");
  expect(s.requested_bytes.current == 1000 && s.requested_bytes.peak == 1100, "bytes as asked for");
  expect(s.reserved_bytes.current == static_cast<int64_t>(2 * kMiB) && s.segments.current == 1, "reserved");
  (*chips).reset_peaks();
  (*chips).reset_totals();
  expect((*chips).statistics().allocated_bytes.peak == 1024 && (*chips).statistics().allocations.added == 0, "reset");
  (*chips).release(b);
}

void an_address_is_found_in_its_chip_and_segment() {
  Chips chips(4 * kMiB, 3);
  auto* block = static_cast<std::byte*>(chips.arenas.of_chip(1).allocate(kMiB));
  expect(chips.arenas.chip_of(block) == 1 && chips.arenas.chip_of(&chips) == -1, "the chip");
  expect(chips.arenas.segment_offset(block, kMiB) == block - chips.segment.base(), "the offset");
  expect(chips.arenas.segment_offset(block, 4 * kMiB + 1) == -1, "not beyond the chip's memory");
  expect(chips.arenas.segment_offset(chips.segment.base(), 1) == -1, "the control region is no chip's");
  expect(chips.arenas.chip_of(chips.segment.base() + chips.segment.nbytes()) == -1, "nor what lies behind");
  Mapping peer(chips.segment.fd(), chips.segment.nbytes());
  std::memset(block, 42, kMiB);
  expect(peer.base()[chips.arenas.segment_offset(block, 1)] == std::byte{42}, "a peer reads it there");
}

// Sizes as a decode loop and a trainer have them: many small, some large, life times of all lengths; up to 80 % full of
// the default HXCOMM_HBM, with blocks of up to 64 MiB.
void a_million_random_steps_never_fail_for_fragmentation() {
  constexpr size_t kCapacity = 16384 * kMiB, kMost = kCapacity / 4 * 3;
  for (uint64_t seed : {1, 2}) {
    Chips chips(kCapacity);
    Arena& arena = *chips;
    std::mt19937_64 random(seed);
    struct Live {
      unsigned char* data;
      size_t nbytes;
    };
    std::vector<Live> live;
    size_t used = 0;
    for (int step = 0; step < 500'000; ++step) {
      const auto log = random() % 100 < 95 ? random() % 18 : 18 + random() % 7;  // to 256 KiB; to 32 MiB
      const size_t nbytes = (size_t{1} << log) + random() % (size_t{1} << log);
      while (!live.empty() && (used + nbytes > kMost || random() % 2 == 0)) {
        const size_t which = random() % live.size();
        arena.release(live[which].data);
        used -= live[which].nbytes;
        live[which] = live.back();
        live.pop_back();
        if (used + nbytes <= kMost) break;
      }
      // Growth: most steps allocate twice what they release, until it is full.
      for (int i = 0; i < 2 && used + nbytes <= kMost; ++i) {
        auto* data = static_cast<unsigned char*>(arena.allocate(nbytes));
        if (data == nullptr) {
          expect(false, "memory: seed " + std::to_string(seed) + ", step " + std::to_string(step) + ", " +
                            std::to_string(nbytes) + " bytes, " + std::to_string(used) + " in use, largest free " +
                            std::to_string(arena.largest_free()));
          return;
        }
        live.push_back({data, nbytes});
        used += nbytes;
      }
      if (step % 50'000 == 0) expect(arena.inconsistency()[0] == 0, std::string("not ") + arena.inconsistency());
    }
    expect(used > kCapacity / 2, "an arena that was fairly full");
    for (const Live& each : live) arena.release(each.data);
    expect(arena.largest_free() == kCapacity && arena.inconsistency()[0] == 0, "one free range at the end");
  }
}

void threads_never_get_overlapping_blocks() {
  Chips chips(64 * kMiB);
  int spoiled[4] = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < 2000; ++i) {
        const size_t nbytes = 1 + i * 977 % 20'000;
        auto* block = static_cast<unsigned char*>((*chips).allocate(nbytes));
        std::memset(block, t + 1, nbytes);
        std::this_thread::yield();
        for (size_t b = 0; b < nbytes; b += 100)
          if (block[b] != t + 1) ++spoiled[t];
        (*chips).release(block);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (int count : spoiled) expect(count == 0, "no byte written by another thread");
  expect((*chips).inconsistency()[0] == 0 && (*chips).largest_free() == 64 * kMiB, "one free range at the end");
}

void a_chip_that_cannot_be_is_an_error() {
  expect_error(ErrorKind::usage, {"multiple of 2 MiB", "4096"}, [] { Arena(-1, 0, nullptr, 4096); });
  expect_error(ErrorKind::usage, {"less than 1 TiB"}, [] { Arena(-1, 0, nullptr, size_t{1} << 40); });
}

}  // namespace

int main() {
  return run({
      {"a block is aligned and overlaps no other", a_block_is_aligned_and_overlaps_no_other},
      {"what is released is the next of its size", what_is_released_is_the_next_of_its_size},
      {"releases leave one free range", releases_leave_one_free_range},
      {"what can be reclaimed is not missing", what_can_be_reclaimed_is_not_missing},
      {"a full arena returns nothing and counts it", a_full_arena_returns_nothing_and_counts_it},
      {"a range that just fits is found in its own class", a_range_that_just_fits_is_found_in_its_own_class},
      {"what is released while held is kept", what_is_released_while_held_is_kept},
      {"trimmed memory costs nothing and what is in use stays", trimmed_memory_costs_nothing_and_what_is_in_use_stays},
      {"statistics are those of CUDA", statistics_are_those_of_cuda},
      {"an address is found in its chip and segment", an_address_is_found_in_its_chip_and_segment},
      {"a million random steps never fail for fragmentation", a_million_random_steps_never_fail_for_fragmentation},
      {"threads never get overlapping blocks", threads_never_get_overlapping_blocks},
      {"a chip that cannot be is an error", a_chip_that_cannot_be_is_an_error},
  });
}

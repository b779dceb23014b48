#include "core/arena.h"

#include <fcntl.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <string>

#include "core/errors.h"

namespace hxcomm {
namespace {

// Small blocks are cut from the front of a free range and large ones from its back, so that long-lived small ones do
// not end up between large ones.
constexpr uint32_t kLargeGranules = (size_t{1} << 20) / Arena::kAlignment;

void add(ArenaCounter& counter, size_t amount) {
  counter.current += static_cast<int64_t>(amount);
  counter.added += static_cast<int64_t>(amount);
  counter.peak = std::max(counter.peak, counter.current);
}

void subtract(ArenaCounter& counter, size_t amount) {
  counter.current -= static_cast<int64_t>(amount);
  counter.removed += static_cast<int64_t>(amount);
}

template <class Function>
void for_each_counter(ArenaStatistics& s, Function function) {
  for (ArenaCounter* counter : {&s.allocations, &s.active, &s.segments, &s.allocated_bytes, &s.active_bytes,
                                &s.reserved_bytes, &s.requested_bytes})
    function(*counter);
}

}  // namespace

Arena::Arena(int fd, size_t offset, std::byte* base, size_t nbytes)
    : fd_(fd), offset_(offset), base_(base), nbytes_(nbytes), starts_(nullptr, std::free) {
  const size_t granules = nbytes / kAlignment;
  if (nbytes == 0 || nbytes % kPiece != 0 || granules >= kNone)
    throw Error(ErrorKind::usage,
                "a chip's memory is a multiple of 2 MiB and less than 1 TiB, not " + std::to_string(nbytes) + " bytes");
  for (auto& list : lists_) list.fill(kNone);
  reserved_.resize(nbytes / kPiece);
  const Index all = make_block();
  blocks_[all].size = static_cast<uint32_t>(granules);
  insert_free(all);
}

Arena::Class Arena::class_of(uint32_t size) {
  if (size < kSubs) return {0, size};
  const auto log = static_cast<unsigned>(std::bit_width(size)) - 1;
  return {log - kSubBits + 1, (size >> (log - kSubBits)) & (kSubs - 1)};
}

Arena::Index Arena::make_block() {
  if (spare_.empty()) {
    blocks_.emplace_back();
    return static_cast<Index>(blocks_.size() - 1);
  }
  const Index index = spare_.back();
  spare_.pop_back();
  return index;
}

void Arena::insert_free(Index index) {
  Block& block = blocks_[index];
  const auto [level, sub] = class_of(block.size);
  block.state = State::free;
  block.previous = kNone;
  block.next = lists_[level][sub];
  if (block.next != kNone) blocks_[block.next].previous = index;
  lists_[level][sub] = index;
  subs_[level] |= 1u << sub;
  levels_ |= 1u << level;
}

void Arena::remove_free(Index index) {
  const Block& block = blocks_[index];
  const auto [level, sub] = class_of(block.size);
  if (block.next != kNone) blocks_[block.next].previous = block.previous;
  if (block.previous != kNone) {
    blocks_[block.previous].next = block.next;
  } else if ((lists_[level][sub] = block.next) == kNone) {
    if ((subs_[level] &= ~(1u << sub)) == 0) levels_ &= ~(1u << level);
  }
}

Arena::Index Arena::find(uint32_t size) const {
  auto [level, sub] = class_of(size);
  // The first blocks of its own class may be just large enough: what was released a moment ago is still in the cache.
  Index own = lists_[level][sub];
  for (int looked = 0; own != kNone && looked < 4; own = blocks_[own].next, ++looked)
    if (blocks_[own].size >= size) return own;
  // Every block of a higher class fits.
  uint32_t subs = sub + 1 < kSubs ? subs_[level] & (~0u << (sub + 1)) : 0;
  if (subs == 0) {
    const uint32_t levels = level + 1 < kLevels ? levels_ & (~0u << (level + 1)) : 0;
    if (levels == 0) {
      while (own != kNone && blocks_[own].size < size) own = blocks_[own].next;
      return own;
    }
    level = static_cast<unsigned>(std::countr_zero(levels));
    subs = subs_[level];
  }
  return lists_[level][static_cast<unsigned>(std::countr_zero(subs))];
}

// Cuts `size` off a block that is in no list; what remains becomes a free block. Returns the block of that size.
Arena::Index Arena::split(Index index, uint32_t size) {
  if (blocks_[index].size == size) return index;
  const Index rest = make_block();
  const bool from_back = size >= kLargeGranules;
  const Index first = from_back ? index : rest;
  // `rest` takes the place behind `index` in memory; which of the two is handed out depends on the size.
  Block &front = blocks_[index], &back = blocks_[rest];
  const uint32_t front_size = from_back ? front.size - size : size;
  back.offset = front.offset + front_size;
  back.size = front.size - front_size;
  back.before = index;
  back.after = front.after;
  if (back.after != kNone) blocks_[back.after].before = rest;
  front.after = rest;
  front.size = front_size;
  insert_free(first);
  return from_back ? rest : index;
}

void* Arena::allocate(size_t nbytes) {
  if (nbytes == 0) return nullptr;
  if (void* block = try_allocate(nbytes)) return block;
  if (reclaim_) {
    reclaim_();
    if (void* block = try_allocate(nbytes)) return block;
  }
  const std::lock_guard lock(mutex_);
  ++statistics_.ooms;
  return nullptr;
}

void* Arena::try_allocate(size_t nbytes) {
  const std::lock_guard lock(mutex_);
  if (starts_ == nullptr) {
    // Made only for chips that are used. calloc leaves the zero pages of so large a table (1/64 of the chip's memory)
    // to the kernel, which makes them when they are touched.
    starts_.reset(static_cast<Index*>(std::calloc(nbytes_ / kAlignment, sizeof(Index))));
    if (starts_ == nullptr) return nullptr;
  }
  const size_t granules = (nbytes + kAlignment - 1) / kAlignment;
  Index index = nbytes <= nbytes_ ? find(static_cast<uint32_t>(granules)) : kNone;
  if (index == kNone) return nullptr;
  remove_free(index);
  index = split(index, static_cast<uint32_t>(granules));
  Block& block = blocks_[index];
  block.state = State::allocated;
  block.requested = nbytes;
  starts_[block.offset] = index + 1;
  reserve(block);
  const size_t size = size_t{block.size} * kAlignment;
  add(statistics_.allocations, 1);
  add(statistics_.active, 1);
  add(statistics_.allocated_bytes, size);
  add(statistics_.active_bytes, size);
  add(statistics_.requested_bytes, nbytes);
  return base_ + size_t{block.offset} * kAlignment;
}

void Arena::reserve(const Block& block) {
  const size_t first = size_t{block.offset} * kAlignment / kPiece;
  const size_t last = (size_t{block.offset + block.size} * kAlignment - 1) / kPiece;
  for (size_t piece = first; piece <= last; ++piece) {
    if (reserved_[piece]) continue;
    reserved_[piece] = true;
    add(statistics_.segments, 1);
    add(statistics_.reserved_bytes, kPiece);
  }
}

size_t Arena::release(void* data) {
  const std::lock_guard lock(mutex_);
  if (data == nullptr || starts_ == nullptr) return 0;
  const auto granule = static_cast<size_t>(static_cast<std::byte*>(data) - base_) / kAlignment;
  const Index index = starts_[granule] - 1;
  if (index == kNone || blocks_[index].state != State::allocated) return 0;
  Block& block = blocks_[index];
  starts_[granule] = 0;
  subtract(statistics_.allocations, 1);
  subtract(statistics_.allocated_bytes, size_t{block.size} * kAlignment);
  const size_t requested = block.requested;
  subtract(statistics_.requested_bytes, requested);
  if (holders_.empty()) {
    free_block(index);
  } else {
    block.state = State::held;
    held_.push_back({index, last_token_});
  }
  return requested;
}

void Arena::free_block(Index index) {
  subtract(statistics_.active, 1);
  subtract(statistics_.active_bytes, size_t{blocks_[index].size} * kAlignment);
  const auto swallow = [this](Index keeper, Index other) {  // `other` lies right behind `keeper`
    Block &front = blocks_[keeper], &back = blocks_[other];
    front.size += back.size;
    front.after = back.after;
    if (front.after != kNone) blocks_[front.after].before = keeper;
    back = Block{};
    spare_.push_back(other);
  };
  if (const Index after = blocks_[index].after; after != kNone && blocks_[after].state == State::free) {
    remove_free(after);
    swallow(index, after);
  }
  if (const Index before = blocks_[index].before; before != kNone && blocks_[before].state == State::free) {
    remove_free(before);
    swallow(before, index);
    index = before;
  }
  insert_free(index);
}

uint64_t Arena::hold() {
  const std::lock_guard lock(mutex_);
  holders_.insert(++last_token_);
  return last_token_;
}

void Arena::unhold(uint64_t token) {
  const std::lock_guard lock(mutex_);
  holders_.erase(token);
  drop_held();
}

// Releases in order of release: a block waits for every holder that was there before it, and so for none that came
// later.
void Arena::drop_held() {
  while (!held_.empty() && (holders_.empty() || *holders_.begin() > held_.front().last_token)) {
    free_block(held_.front().block);
    held_.pop_front();
  }
}

size_t Arena::trim() {
  if (reclaim_) reclaim_();
  const std::lock_guard lock(mutex_);
  size_t given_back = 0;
  for (const Block& block : blocks_) {
    if (block.state != State::free) continue;
    const size_t begin = (size_t{block.offset} * kAlignment + kPiece - 1) / kPiece;
    const size_t end = size_t{block.offset + block.size} * kAlignment / kPiece;
    for (size_t piece = begin; piece < end; ++piece) {
      if (!reserved_[piece]) continue;
      fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset_ + piece * kPiece), kPiece);
      reserved_[piece] = false;
      subtract(statistics_.segments, 1);
      subtract(statistics_.reserved_bytes, kPiece);
      given_back += kPiece;
    }
  }
  return given_back;
}

ArenaStatistics Arena::statistics() const {
  const std::lock_guard lock(mutex_);
  return statistics_;
}

void Arena::reset_peaks() {
  const std::lock_guard lock(mutex_);
  for_each_counter(statistics_, [](ArenaCounter& counter) { counter.peak = counter.current; });
}

void Arena::reset_totals() {
  const std::lock_guard lock(mutex_);
  for_each_counter(statistics_, [](ArenaCounter& counter) { counter.added = counter.removed = 0; });
  statistics_.ooms = 0;
}

size_t Arena::largest_free() const {
  const std::lock_guard lock(mutex_);
  uint32_t largest = 0;
  for (const Block& block : blocks_)
    if (block.state == State::free) largest = std::max(largest, block.size);
  return size_t{largest} * kAlignment;
}

const char* Arena::inconsistency() const {
  const std::lock_guard lock(mutex_);
  Index index = 0;  // the block at the front is the first that was made: it is cut at its end and swallows what follows
  uint32_t expected = 0;
  size_t active = 0, seen = 0;
  for (Index before = kNone; index != kNone; before = index, index = blocks_[index].after, ++seen) {
    const Block& block = blocks_[index];
    if (block.offset != expected || block.size == 0) return "a gap or an overlap between blocks";
    if (block.before != before) return "neighbours that do not know each other";
    if (block.state == State::unused) return "an unused entry among the blocks";
    if (block.state == State::free && before != kNone && blocks_[before].state == State::free)
      return "two free neighbours";
    if (block.state == State::allocated && starts_[block.offset] != index + 1) return "a block that is not to be found";
    if (block.state != State::free) active += size_t{block.size} * kAlignment;
    expected += block.size;
  }
  if (size_t{expected} * kAlignment != nbytes_) return "blocks that do not fill the arena";
  if (seen + spare_.size() != blocks_.size()) return "lost blocks";
  return active == static_cast<size_t>(statistics_.active_bytes.current) ? "" : "bytes counted wrongly";
}

Arenas::Arenas(int fd, size_t offset, std::byte* base, int chips, size_t bytes_per_chip)
    : offset_(offset), base_(base), bytes_per_chip_(bytes_per_chip) {
  for (size_t chip = 0; chip < static_cast<size_t>(chips); ++chip)
    arenas_.push_back(
        std::make_unique<Arena>(fd, offset + chip * bytes_per_chip, base + chip * bytes_per_chip, bytes_per_chip));
}

int Arenas::chip_of(const void* data, size_t nbytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(base_);
  if (begin >= arenas_.size() * bytes_per_chip_) return -1;
  return nbytes <= bytes_per_chip_ - begin % bytes_per_chip_ ? static_cast<int>(begin / bytes_per_chip_) : -1;
}

int64_t Arenas::segment_offset(const void* data, size_t nbytes) const {
  return chip_of(data, nbytes) < 0 ? -1 : static_cast<int64_t>(offset_) + (static_cast<const std::byte*>(data) - base_);
}

}  // namespace hxcomm

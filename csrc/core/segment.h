// A sealed memfd that a process shares with its peers, and the page allocator over it.
//
// The file is large and sparse (only touched or allocated pages cost memory), is not bound by the size of /dev/shm, is
// gone with its last process however that ends, and sealed against shrinking it cannot SIGBUS a peer. Only the owner
// allocates; what is allocated is committed at once (fallocate), so a full machine is an error here, not a signal
// later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include "core/directory.h"
#include "core/line.h"

namespace hxcomm {

class Segment {
 public:
  // Creates, seals and maps the memfd and writes its header. Throws Error{init} with errno's text. allocate() takes
  // from the first `nbytes`; behind them lie `arena_bytes` for the memory of chips, which is never committed here.
  Segment(size_t nbytes, const uint8_t (&nonce)[16], size_t arena_bytes = 0);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  int fd() const { return fd_; }
  size_t nbytes() const { return nbytes_; }
  size_t control_bytes() const { return control_bytes_; }
  std::byte* base() const { return base_; }
  SegmentHeader& header() const { return *reinterpret_cast<SegmentHeader*>(base_); }

  // Commits a zeroed range of whole pages and returns its offset. Throws Error{init} naming sizes when memory or the
  // segment is exhausted. Thread-safe.
  size_t allocate(size_t nbytes);
  // Gives the range's pages back to the kernel. Thread-safe.
  void release(size_t offset, size_t nbytes);
  size_t allocated_bytes() const;

  // Names a group's control page in the segment's directory, and takes it out again. Thread-safe.
  void enlist(uint64_t group_nonce, uint64_t control_offset);
  void strike(uint64_t control_offset);

 private:
  Directory& directory() const { return *reinterpret_cast<Directory*>(base_ + Directory::kOffset); }

  int fd_ = -1;
  size_t control_bytes_ = 0;
  size_t nbytes_ = 0;
  std::byte* base_ = nullptr;
  mutable std::mutex mutex_;
  std::map<size_t, size_t> free_;  // offset -> length, coalesced
  size_t allocated_ = 0;
};

// A peer's segment, mapped. The descriptor is closed after mapping; the mapping keeps the memory alive after the peer.
class Mapping {
 public:
  Mapping(int fd, size_t nbytes);  // throws Error{init}; does not close fd
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  std::byte* base() const { return base_; }
  size_t nbytes() const { return nbytes_; }
  SegmentHeader& header() const { return *reinterpret_cast<SegmentHeader*>(base_); }

 private:
  std::byte* base_ = nullptr;
  size_t nbytes_ = 0;
};

}  // namespace hxcomm

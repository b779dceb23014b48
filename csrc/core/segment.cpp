#include "core/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "core/errors.h"

namespace hxcomm {
namespace {

constexpr size_t kPage = 4096;

[[noreturn]] void fail(const std::string& what) { throw Error(ErrorKind::init, what + ": " + std::strerror(errno)); }

std::byte* map_shared(int fd, size_t nbytes) {
  void* base = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED) fail("cannot map a shared segment of " + std::to_string(nbytes) + " bytes");
  // A forked child must not write into the ring's memory: there the mapping does not exist.
  if (madvise(base, nbytes, MADV_DONTFORK) != 0) fail("madvise(MADV_DONTFORK) on a shared segment");
  return static_cast<std::byte*>(base);
}

}  // namespace

Segment::Segment(size_t nbytes, const uint8_t (&nonce)[16], size_t arena_bytes)
    : control_bytes_((nbytes + kPage - 1) / kPage * kPage), nbytes_(control_bytes_ + arena_bytes) {
  fd_ = memfd_create("hxcomm", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd_ < 0) fail("memfd_create");
  try {
    if (ftruncate(fd_, static_cast<off_t>(nbytes_)) != 0) fail("cannot size the shared segment");
    if (fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail("cannot seal the shared segment");
    base_ = map_shared(fd_, nbytes_);
    if (fallocate(fd_, 0, 0, kPage) != 0) fail("no memory for the first page of the shared segment");
  } catch (...) {
    if (base_ != nullptr) munmap(base_, nbytes_);
    close(fd_);
    throw;
  }
  SegmentHeader& h = header();
  h.magic = kSegmentMagic;
  h.version = kProtocolVersion;
  h.pid = getpid();
  std::memcpy(h.nonce, nonce, sizeof(h.nonce));
  free_[kPage] = control_bytes_ - kPage;
}

Segment::~Segment() {
  munmap(base_, nbytes_);
  close(fd_);
}

size_t Segment::allocate(size_t nbytes) {
  nbytes = (nbytes + kPage - 1) / kPage * kPage;
  std::lock_guard lock(mutex_);
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const auto [offset, length] = *it;
    if (length < nbytes) continue;
    // Kernels before 6.8 end fallocate on any signal, a profiler's timer for instance.
    int rc = 0;
    while ((rc = fallocate(fd_, 0, static_cast<off_t>(offset), static_cast<off_t>(nbytes))) != 0 && errno == EINTR) {
    }
    if (rc != 0)
      fail("no memory for " + std::to_string(nbytes) + " bytes of shared staging (" + std::to_string(allocated_) +
           " bytes allocated so far)");
    free_.erase(it);
    if (length > nbytes) free_[offset + nbytes] = length - nbytes;
    allocated_ += nbytes;
    return offset;
  }
  throw Error(ErrorKind::init, "the shared segment of " + std::to_string(control_bytes_) + " bytes is full: " +
                                   std::to_string(nbytes) + " more were asked for, " + std::to_string(allocated_) +
                                   " are allocated; destroy groups that are no longer used");
}

void Segment::release(size_t offset, size_t nbytes) {
  nbytes = (nbytes + kPage - 1) / kPage * kPage;
  std::lock_guard lock(mutex_);
  // Punching the hole also zeroes the range, which allocate() promises.
  fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset), static_cast<off_t>(nbytes));
  allocated_ -= nbytes;
  auto it = free_.emplace(offset, nbytes).first;
  if (auto next = std::next(it); next != free_.end() && it->first + it->second == next->first) {
    it->second += next->second;
    free_.erase(next);
  }
  if (it != free_.begin())
    if (auto prev = std::prev(it); prev->first + prev->second == it->first) {
      prev->second += it->second;
      free_.erase(it);
    }
}

size_t Segment::allocated_bytes() const {
  std::lock_guard lock(mutex_);
  return allocated_;
}

void Segment::enlist(uint64_t group_nonce, uint64_t control_offset) {
  std::lock_guard lock(mutex_);
  for (DirectoryEntry& entry : directory().entries) {
    if (entry.nonce.load(std::memory_order_relaxed) != 0) continue;
    entry.control_offset = control_offset;
    entry.nonce.store(group_nonce, std::memory_order_release);
    return;
  }
}

void Segment::strike(uint64_t control_offset) {
  std::lock_guard lock(mutex_);
  for (DirectoryEntry& entry : directory().entries)
    if (entry.control_offset == control_offset) entry.nonce.store(0, std::memory_order_release);
}

Mapping::Mapping(int fd, size_t nbytes) : base_(map_shared(fd, nbytes)), nbytes_(nbytes) {}

Mapping::~Mapping() { munmap(base_, nbytes_); }

}  // namespace hxcomm

// Unit test of the shared segment: its allocator, what it promises of memory, and its seals.
#include "core/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <thread>
#include <vector>

#include "tests/expect.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

constexpr size_t kPage = 4096;
constexpr uint8_t kNonce[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

bool all_bytes_are(const Segment& segment, size_t offset, size_t nbytes, int value) {
  const std::byte* begin = segment.base() + offset;
  return std::all_of(begin, begin + nbytes, [&](std::byte b) { return b == static_cast<std::byte>(value); });
}

// Bytes of memory that the kernel holds for the segment.
size_t committed_bytes(const Segment& segment) {
  struct stat info{};
  fstat(segment.fd(), &info);
  return static_cast<size_t>(info.st_blocks) * 512;
}

void the_header_says_whose_it_is() {
  const Segment segment(10 * kPage - 5, kNonce);
  expect(segment.nbytes() == 10 * kPage, "whole pages");
  const SegmentHeader& header = segment.header();
  expect(header.magic == kSegmentMagic && header.version == kProtocolVersion, "magic and version");
  expect(header.pid == getpid() && std::memcmp(header.nonce, kNonce, 16) == 0, "pid and nonce");
  const Mapping mapping(segment.fd(), segment.nbytes());
  expect(mapping.base() != segment.base() && mapping.header().pid == getpid(), "the same memory in a second mapping");
}

void a_range_is_whole_pages_committed_and_zero() {
  Segment segment(64 * kPage, kNonce);
  const size_t before = committed_bytes(segment);
  const size_t a = segment.allocate(1), b = segment.allocate(kPage + 1);
  expect(a % kPage == 0 && b % kPage == 0 && a >= kPage, "pages after the header's");
  expect(b >= a + kPage || a >= b + 2 * kPage, "no overlap");
  expect(segment.allocated_bytes() == 3 * kPage, "3 pages allocated");
  expect(committed_bytes(segment) == before + 3 * kPage, "3 pages of memory committed before they are touched");
  expect(all_bytes_are(segment, a, kPage, 0) && all_bytes_are(segment, b, 2 * kPage, 0), "zeros");
}

void a_released_range_costs_nothing_and_comes_back_zeroed() {
  Segment segment(64 * kPage, kNonce);
  const size_t before = committed_bytes(segment);
  const size_t first = segment.allocate(8 * kPage);
  std::memset(segment.base() + first, 0xff, 8 * kPage);
  segment.release(first, 8 * kPage);
  expect(segment.allocated_bytes() == 0 && committed_bytes(segment) == before, "the pages given back");
  const size_t again = segment.allocate(8 * kPage);
  expect(again == first && all_bytes_are(segment, again, 8 * kPage, 0), "the same range, zeroed");
}

void releases_in_any_order_leave_one_free_range() {
  std::array<size_t, 4> order = {0, 1, 2, 3};
  do {
    Segment segment(9 * kPage, kNonce);
    size_t offsets[4];
    for (size_t& offset : offsets) offset = segment.allocate(2 * kPage);
    for (size_t i : order) segment.release(offsets[i], 2 * kPage);
    expect(segment.allocate(8 * kPage) == kPage, "all of the segment in one piece");
  } while (std::next_permutation(order.begin(), order.end()));
}

void a_gap_too_small_is_passed_over_and_used_by_what_fits() {
  Segment segment(9 * kPage, kNonce);
  const size_t gap = segment.allocate(2 * kPage);
  segment.allocate(kPage);
  segment.release(gap, 2 * kPage);
  const size_t large = segment.allocate(3 * kPage);
  expect(large > gap, "3 pages behind the gap of 2");
  expect(segment.allocate(kPage) == gap && segment.allocate(kPage) == gap + kPage, "the gap used by single pages");
}

void a_full_segment_is_an_error_that_names_the_sizes() {
  Segment segment(4 * kPage, kNonce);
  segment.allocate(2 * kPage);
  const auto too_much = [&] { segment.allocate(2 * kPage); };
  expect_error(ErrorKind::init, {"segment of 16384 bytes is full", "8192 more", "8192 are allocated", "destroy groups"},
               too_much);
  expect(segment.allocated_bytes() == 2 * kPage, "nothing lost by the refusal");
  expect(segment.allocate(kPage) == 3 * kPage, "the last page still to be had");
}

void memory_that_cannot_be_committed_is_an_error_and_loses_nothing() {
  Segment segment(16 * kPage, kNonce);
  segment.allocate(kPage);
  // Exhausting a machine's memory is no test: a pipe under the segment's number makes fallocate() fail just as well.
  const int memory = dup(segment.fd());
  int ends[2];
  expect(pipe(ends) == 0 && dup2(ends[1], segment.fd()) >= 0, "a pipe in the segment's place");
  const auto commit = [&] { segment.allocate(3 * kPage); };
  expect_error(ErrorKind::init, {"no memory for 12288 bytes", "4096 bytes allocated so far", std::strerror(ESPIPE)},
               commit);
  dup2(memory, segment.fd());
  for (int fd : {memory, ends[0], ends[1]}) close(fd);
  expect(segment.allocated_bytes() == kPage && segment.allocate(15 * kPage - kPage) == 2 * kPage, "all the rest free");
}

void a_segment_that_cannot_exist_is_an_error() {
  expect_error(ErrorKind::init, {"segment", std::strerror(EINVAL)}, [] { Segment(0, kNonce); });
  expect_error(ErrorKind::init, {"segment"}, [] { Segment(size_t{1} << 62, kNonce); });
  expect_error(ErrorKind::init, {"cannot map a shared segment of 4096 bytes"}, [] { Mapping(-1, kPage); });
}

void it_is_sealed_against_shrinking_growing_and_other_seals() {
  const Segment segment(4 * kPage, kNonce);
  const auto refused = [](int rc) { return rc == -1 && errno == EPERM; };
  expect(refused(ftruncate(segment.fd(), kPage)), "EPERM from shrinking");
  expect(refused(ftruncate(segment.fd(), 8 * kPage)), "EPERM from growing");
  expect(refused(fcntl(segment.fd(), F_ADD_SEALS, F_SEAL_WRITE)), "EPERM from another seal");
  expect((fcntl(segment.fd(), F_GETFD) & FD_CLOEXEC) != 0, "close-on-exec");
}

void a_forked_child_does_not_have_the_mapping() {
  const Segment segment(4 * kPage, kNonce);
  const pid_t child = fork();
  if (child == 0) {
    unsigned char resident = 0;
    _exit(mincore(segment.base(), kPage, &resident) == -1 && errno == ENOMEM ? 0 : 1);
  }
  int status = -1;
  expect(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "nothing mapped there");
}

void threads_never_get_overlapping_ranges() {
  Segment segment(256 * kPage, kNonce);
  int spoiled[4] = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < 200; ++i) {
        const size_t nbytes = (1 + i % 7) * kPage, offset = segment.allocate(nbytes);
        if (!all_bytes_are(segment, offset, nbytes, 0)) ++spoiled[t];
        std::memset(segment.base() + offset, t + 1, nbytes);
        std::this_thread::yield();
        if (!all_bytes_are(segment, offset, nbytes, t + 1)) ++spoiled[t];
        segment.release(offset, nbytes);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (int count : spoiled) expect(count == 0, "no byte written by another thread");
  expect(segment.allocated_bytes() == 0 && segment.allocate(255 * kPage) == kPage, "one free range at the end");
}

}  // namespace

int main() {
  return run({
      {"the header says whose it is", the_header_says_whose_it_is},
      {"a range is whole pages, committed and zero", a_range_is_whole_pages_committed_and_zero},
      {"a released range costs nothing and comes back zeroed", a_released_range_costs_nothing_and_comes_back_zeroed},
      {"releases in any order leave one free range", releases_in_any_order_leave_one_free_range},
      {"a gap too small is passed over and used by what fits", a_gap_too_small_is_passed_over_and_used_by_what_fits},
      {"a full segment is an error that names the sizes", a_full_segment_is_an_error_that_names_the_sizes},
      {"memory that cannot be committed is an error and loses nothing",
       memory_that_cannot_be_committed_is_an_error_and_loses_nothing},
      {"a segment that cannot exist is an error", a_segment_that_cannot_exist_is_an_error},
      {"it is sealed against shrinking, growing and other seals",
       it_is_sealed_against_shrinking_growing_and_other_seals},
      {"a forked child does not have the mapping", a_forked_child_does_not_have_the_mapping},
      {"threads never get overlapping ranges", threads_never_get_overlapping_ranges},
  });
}

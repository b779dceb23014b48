// Unit test of the wire: frames both ways in each mode, lent memory, and how the end of a connection is told.
//
// Several wires of one process stand for several hosts. Arguments: libraries to load first.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>

#include "tests/wire_host.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

// Before this process has a thread: the child makes some of its own. It connects, forks, and ends at a word from us;
// its own child stays until we hang up.
void a_death_is_seen_though_a_forked_child_lives_on() {
  for (const bool lower : {true, false}) {
    int to_child[2], from_child[2], life[2];
    if (pipe(to_child) != 0 || pipe(from_child) != 0 || pipe(life) != 0) throw Error(ErrorKind::init, "pipe");
    struct Card {
      Nonce nonce;
      char address[64];
    };
    const auto exchange = [](const Host& host, int out, int in) {
      Card card{host.nonce, {}}, other;
      host.wire->address().copy(card.address, sizeof card.address - 1);
      expect(write(out, &card, sizeof card) == sizeof card && read(in, &other, sizeof other) == sizeof other, "a card");
      return other;
    };
    const WireSecurity security = security_of(WireSecurity::Mode::none, 7);
    const pid_t child = fork();
    if (child == 0) {
      close(to_child[1]);
      close(life[1]);
      Host host(lower ? 1 : 3, security);
      const Card parent = exchange(host, from_child[1], to_child[0]);
      host.wire->connect(parent.nonce, parent.address);
      pump_until({&host}, [&] { return host.wire->is_connected(parent.nonce); });
      char word;
      if (fork() != 0) _exit(read(to_child[0], &word, 1) == 1 ? 0 : 1);
      _exit(read(life[0], &word, 1) == 0 ? 0 : 1);
    }
    close(to_child[0]);
    Host host(2, security);
    const Card other = exchange(host, to_child[1], from_child[0]);
    host.wire->connect(other.nonce, other.address);
    expect(pump_until({&host}, [&] { return host.wire->is_connected(other.nonce); }), "a connection");
    expect(write(to_child[1], "e", 1) == 1 && waitpid(child, nullptr, 0) == child, "the child's end");
    expect(pump_until({&host}, [&] { return host.records->losses.size() == 1; }), "its loss");
    for (const int fd : {to_child[1], from_child[0], from_child[1], life[0], life[1]}) close(fd);
  }
}

void frames_arrive_whole_and_in_order_both_ways_in_each_mode() {
  for (const auto mode : kModes) {
    Host a(1, security_of(mode, 7)), b(2, security_of(mode, 7));
    expect_connected(a, b);
    const size_t sizes[] = {0, 1, 33, 16'384, kMaxPayloadBytes, 5};
    for (uint32_t i = 0; i < std::size(sizes); ++i) {
      const std::string bytes(sizes[i], static_cast<char>('a' + i));
      expect(a.wire->send(b.nonce, header_of(i), bytes.data(), bytes.size()), "a frame sent by a");
      expect(b.wire->send(a.nonce, header_of(i), bytes.data(), bytes.size()), "a frame sent by b");
    }
    const auto all = [&](const Host& host) { return host.records->frames.size() == std::size(sizes); };
    expect(pump_until({&a, &b}, [&] { return all(a) && all(b); }), "all frames");
    for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}})
      for (uint32_t i = 0; i < std::size(sizes); ++i) {
        const Frame& frame = to->records->frames.at(i);
        expect(frame.from == from->nonce && frame.header.number == i && frame.header.sequence == 1'000 + i &&
                   frame.header.source == 3 && frame.header.destination == 5 && frame.header.group == kGroup,
               "the header as it was sent");
        expect(frame.bytes == std::string(sizes[i], static_cast<char>('a' + i)), "the payload as it was sent");
      }
    expect(a.wire->ignored_frames() + b.wire->ignored_frames() == 0, "nothing ignored");
  }
}

void a_lost_process_is_told_once_with_its_nonce_on_both_kinds_of_ends() {
  for (const auto mode : kModes)
    for (const bool lower : {true, false}) {
      Host survivor(lower ? 1 : 3, security_of(mode, 7)), dying(2, security_of(mode, 7)),
          other(9, security_of(mode, 7));
      expect_connected(survivor, dying);
      expect_connected(survivor, other);
      const std::string last = "sent before the end";
      expect(dying.wire->send(survivor.nonce, header_of(0), last.data(), last.size()), "a last frame");
      dying.wire.reset();
      expect(pump_until({&survivor, &other}, [&] { return !survivor.records->losses.empty(); }), "a loss");
      for (int i = 0; i < 10; ++i) survivor.wire->pump();
      const auto& losses = survivor.records->losses;
      expect(losses.size() == 1 && losses[0].first == dying.nonce, "one loss, of that process");
      expect(losses[0].second == "closed its connection (process or host died, cause unknown)", losses[0].second);
      expect(survivor.records->frames.size() == 1 && survivor.records->frames[0].bytes == last,
             "what it had sent before, first");
      expect(!survivor.is_connected(dying) && survivor.is_connected(other), "only that one lost");
      expect(!survivor.wire->send(dying.nonce, header_of(1), nullptr, 0), "nothing sent to it");
      survivor.wire->connect(dying.nonce, "tcp://127.0.0.1:1");
      expect(!survivor.is_connected(dying), "a lost process to stay lost");
    }
}

void the_last_frame_of_a_process_that_ends_arrives_whole() {
  for (const bool lower : {true, false}) {
    Host stays(lower ? 1 : 3, security_of(WireSecurity::Mode::curve, 7)),
        ends(2, security_of(WireSecurity::Mode::curve, 7));
    expect_connected(stays, ends);
    const std::string last(1 << 20, 'z');
    expect(ends.wire->send(stays.nonce, header_of(0), last.data(), last.size()), "a last frame");
    ends.wire.reset();
    expect(pump_until({&stays}, [&] { return !stays.is_connected(ends); }), "the end of the connection");
    expect(stays.records->frames.size() == 1 && stays.records->frames[0].bytes == last, "the last frame, whole");
    expect(!stays.wire->send(ends.nonce, header_of(1), nullptr, 0), "nothing sent to it");
  }
}

void one_payload_goes_to_several_peers() {
  for (const auto mode : kModes) {
    Host a(1, security_of(mode, 7)), b(2, security_of(mode, 7)), c(3, security_of(mode, 7));
    expect_connected(a, b);
    expect_connected(a, c);
    for (const size_t nbytes : {size_t{5}, size_t{100'000}}) {
      Payload payload = a.wire->make_payload(nbytes);
      std::fill_n(payload.data(), nbytes, std::byte{0x5A});
      expect(a.wire->send(b.nonce, header_of(1), payload) && a.wire->send(c.nonce, header_of(2), payload), "both sent");
    }
    expect(pump_until({&a, &b, &c}, [&] { return b.records->frames.size() == 2 && c.records->frames.size() == 2; }),
           "both frames at both");
    for (const Host* host : {&b, &c})
      expect(host->records->frames[0].bytes == std::string(5, 'Z') &&
                 host->records->frames[1].bytes == std::string(100'000, 'Z'),
             "the same bytes");
  }
}

void lent_memory_comes_back_whether_it_arrives_or_not() {
  for (const auto mode : kModes)
    for (const bool lower : {true, false}) {
      Host a(lower ? 1 : 3, security_of(mode, 7)), b(2, security_of(mode, 7));
      const auto lent = std::make_shared<std::atomic<int>>(0);
      const std::string bytes(kMaxPayloadBytes, 'x');
      const auto send = [&] { return a.wire->send_lent(b.nonce, header_of(0), bytes.data(), bytes.size(), lent); };
      expect(!send() && lent->load() == 0, "memory given back at once before the connection");
      expect_connected(a, b);
      expect(send(), "a frame sent");
      expect(pump_until({&a, &b}, [&] { return b.records->frames.size() == 1 && lent->load() == 0; }),
             "memory given back when it has left");
      expect(b.records->frames[0].bytes == bytes, "the bytes");
      // More than the kernel holds, to one who does not read, and then is gone.
      for (int i = 0; i < 40; ++i) expect(send(), "a frame sent");
      b.wire.reset();
      expect(pump_until({&a}, [&] { return lent->load() == 0 && !a.is_connected(b); }),
             "memory given back when the peer is lost");
      expect(!send() && lent->load() == 0, "memory given back at once after the loss");
    }
}

void a_thread_that_sleeps_wakes_though_another_one_sends() {
  Host a(1, security_of(WireSecurity::Mode::none, 7)), b(2, security_of(WireSecurity::Mode::none, 7));
  expect_connected(a, b);
  constexpr uint32_t kFrames = 3'000;
  std::atomic<bool> over{false};
  std::atomic<uint32_t> round{0};
  // A signal lost would let the sleeper sleep on for the whole deadline, and no answer would come.
  std::thread echo([&] {
    while (!over.load()) {
      while (b.wire->pump()) {
      }
      std::vector<Frame> frames = std::move(b.records->frames);
      b.records->frames.clear();
      for (const Frame& frame : frames) b.wire->send(a.nonce, frame.header, frame.bytes.data(), frame.bytes.size());
      if (!frames.empty()) continue;
      std::vector<pollfd> fds;
      b.wire->append_pollfds(&fds);
      poll(fds.data(), fds.size(), static_cast<int>(kDeadlineNs / 1'000'000));
    }
  });
  std::thread chatter([&] {  // its sends, from another thread, take note of arrivals
    FrameHeader header = header_of(0);
    header.group = 1;  // nobody's at a
    for (uint32_t seen = 0; seen < kFrames; seen = round.load()) {
      b.wire->send(a.nonce, header, "noise", 5);
      round.wait(seen);
    }
  });
  bool all = true;
  for (uint32_t i = 0; i < kFrames && all; ++i) {
    round.fetch_add(1);
    round.notify_one();
    all = a.wire->send(b.nonce, header_of(i), &i, sizeof i) &&
          pump_until({&a}, [&] { return a.records->frames.size() == i + 1; });
    expect(all && a.records->frames.back().header.number == i, "an answer to frame " + std::to_string(i));
  }
  over = true;
  round = kFrames;
  round.notify_one();
  a.wire->send(b.nonce, header_of(0), nullptr, 0);
  echo.join();
  chatter.join();
}

void a_handler_may_end_while_a_frame_is_handed_to_it() {
  struct Ending : FrameHandler {
    Wire* wire = nullptr;
    std::shared_ptr<Ending>* owner = nullptr;
    bool* ended = nullptr;
    ~Ending() override {
      wire->unsubscribe(9);
      *ended = true;
    }
    void on_frame(const Nonce&, const FrameHeader&, Payload&&) override { owner->reset(); }
    void on_lost(const Nonce&, const std::string&) override {}
  };
  Host a(1, security_of(WireSecurity::Mode::none, 7)), b(2, security_of(WireSecurity::Mode::none, 7));
  expect_connected(a, b);
  bool ended = false;
  auto ending = std::make_shared<Ending>();
  ending->wire = b.wire.get();
  ending->owner = &ending;
  ending->ended = &ended;
  b.wire->subscribe(9, ending);
  FrameHeader header = header_of(0);
  header.group = 9;
  expect(a.wire->send(b.nonce, header, "x", 1), "a frame sent");
  expect(pump_until({&a, &b}, [&] { return ended; }), "the handler's end");
  expect(a.wire->send(b.nonce, header, "y", 1), "another frame sent");
  expect(pump_until({&a, &b}, [&] { return b.wire->ignored_frames() == 1; }), "a frame of no group dropped");
}

void an_attempt_that_failed_says_why_and_can_be_repeated() {
  Host a(1, security_of(WireSecurity::Mode::curve, 7)), b(2, security_of(WireSecurity::Mode::curve, 7));
  const Host gone(3, security_of(WireSecurity::Mode::none, 7));
  const std::string closed_port = "tcp://127.0.0.1:1";
  a.wire->connect(b.nonce, closed_port);
  expect(pump_until({&a}, [&] { return a.wire->trouble_of(b.nonce).find("nothing answers at " + closed_port) == 0; }),
         "what is wrong, not: " + a.wire->trouble_of(b.nonce));
  for (const char* hint : {"ipc:///tmp/socket", "tcp://example.org:80", "inproc://zeromq.zap.01", ""}) {
    a.wire->connect(b.nonce, hint);
    expect(a.wire->trouble_of(b.nonce).find("is not the numeric address") != std::string::npos, "a hint not followed");
  }
  expect(a.records->losses.empty(), "no loss of whom it never knew");
  expect_connected(a, b);
  expect(a.wire->trouble_of(b.nonce).empty(), "no trouble");
}

void hosts_of_ipv6_find_each_other() {
  const WireSecurity security = security_of(WireSecurity::Mode::curve, 7);
  Host a(1, security), b(2, security);
  a.wire = std::make_unique<Wire>(a.nonce, "::1", security);
  b.wire = std::make_unique<Wire>(b.nonce, "::1", security);
  a.wire->subscribe(kGroup, a.records);
  expect(a.wire->address().starts_with("tcp://[::1]:"), a.wire->address());
  expect_connected(a, b);
  b.wire.reset();
  expect(pump_until({&a}, [&] { return a.records->losses.size() == 1; }), "the loss");
}

void a_wire_without_an_address_says_so() {
  const WireSecurity security = security_of(WireSecurity::Mode::none, 7);
  expect_error(ErrorKind::init, {"cannot listen at tcp://203.0.113.9:*", "requested address"},
               [&] { Wire(Nonce{1}, "203.0.113.9", security); });
}

}  // namespace

int main(int argc, char** argv) {
  load_libraries(argc, argv);
  return run({
      {"a death is seen though a forked child lives on", a_death_is_seen_though_a_forked_child_lives_on},
      {"frames arrive whole and in order, both ways, in each mode",
       frames_arrive_whole_and_in_order_both_ways_in_each_mode},
      {"a lost process is told once, with its nonce, on both kinds of ends",
       a_lost_process_is_told_once_with_its_nonce_on_both_kinds_of_ends},
      {"the last frame of a process that ends arrives whole", the_last_frame_of_a_process_that_ends_arrives_whole},
      {"one payload goes to several peers", one_payload_goes_to_several_peers},
      {"lent memory comes back, whether it arrives or not", lent_memory_comes_back_whether_it_arrives_or_not},
      {"a thread that sleeps wakes though another one sends", a_thread_that_sleeps_wakes_though_another_one_sends},
      {"a handler may end while a frame is handed to it", a_handler_may_end_while_a_frame_is_handed_to_it},
      {"an attempt that failed says why, and can be repeated", an_attempt_that_failed_says_why_and_can_be_repeated},
      {"hosts of IPv6 find each other", hosts_of_ipv6_find_each_other},
      {"a wire without an address says so", a_wire_without_an_address_says_so},
  });
}

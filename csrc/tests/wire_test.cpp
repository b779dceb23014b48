// Unit test of the wire: frames both ways in each mode, what is ignored, and how a lost connection is told.
//
// Several wires of one process stand for several hosts. Arguments: shared objects to load first, as `import zmq` does.
#include <arpa/inet.h>
#include <dlfcn.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/clock.h"
#include "tests/expect.h"
#include "transport/wire.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

constexpr int64_t kDeadlineNs = 20'000'000'000;  // far more than is ever needed: a deadline, not an expectation
constexpr uint64_t kGroup = 77;
constexpr WireSecurity::Mode kModes[] = {WireSecurity::Mode::none, WireSecurity::Mode::curve, WireSecurity::Mode::mac};

Key decoded(const char* z85) {
  uint8_t bytes[33];
  ZmqLibrary::load().z85_decode(bytes, z85);
  Key key;
  std::memcpy(key.data(), bytes, key.size());
  return key;
}

// The keys that a job derives from its secret, here one byte.
WireSecurity security_of(WireSecurity::Mode mode, uint8_t secret) {
  const ZmqLibrary& zmq = ZmqLibrary::load();
  WireSecurity security;
  security.mode = mode;
  security.mac_key.fill(secret);
  security.server_secret.fill(secret);
  security.client_secret.fill(static_cast<uint8_t>(secret + 100));
  for (const auto& [hidden, shown] : {std::pair{&security.server_secret, &security.server_public},
                                      std::pair{&security.client_secret, &security.client_public}}) {
    char secret_z85[41], public_z85[41];
    zmq.z85_encode(secret_z85, hidden->data(), hidden->size());
    zmq.curve_public(public_z85, secret_z85);
    *shown = decoded(public_z85);
  }
  return security;
}

struct Frame {
  Nonce from;
  FrameHeader header;
  std::string bytes;
};

struct Records : FrameHandler {
  std::vector<Frame> frames;
  std::vector<std::pair<Nonce, std::string>> losses;
  void on_frame(const Nonce& from, const FrameHeader& header, Payload&& payload) override {
    frames.push_back({from, header, std::string(reinterpret_cast<const char*>(payload.data()), payload.size())});
  }
  void on_lost(const Nonce& process, const std::string& why) override { losses.emplace_back(process, why); }
};

// A process of a job on a host of its own.
struct Host {
  Host(uint8_t first_byte, const WireSecurity& security) : nonce{first_byte} {
    nonce[15] = ++made;  // another one each time: processes have fresh nonces
    wire = std::make_unique<Wire>(nonce, "127.0.0.1", security);
    wire->subscribe(kGroup, records);
  }
  bool is_connected(const Host& other) const { return wire->is_connected(other.nonce); }
  static inline uint8_t made = 0;
  Nonce nonce;
  std::shared_ptr<Records> records = std::make_shared<Records>();
  std::unique_ptr<Wire> wire;
};

// Pumps all until `done`; false where it is not within the deadline.
bool pump_until(const std::vector<Host*>& hosts, const std::function<bool()>& done) {
  const int64_t deadline = now_ns() + kDeadlineNs;
  while (!done()) {
    if (now_ns() > deadline) return false;
    bool any = false;
    std::vector<pollfd> fds;
    for (const Host* host : hosts)
      if (host->wire) {
        any = host->wire->pump() || any;
        host->wire->append_pollfds(&fds);
      }
    if (!any && !done()) poll(fds.data(), fds.size(), 20);
  }
  return true;
}

void expect_connected(Host& a, Host& b, const std::source_location where = std::source_location::current()) {
  a.wire->connect(b.nonce, b.wire->address());
  b.wire->connect(a.nonce, a.wire->address());
  expect(pump_until({&a, &b}, [&] { return a.is_connected(b) && b.is_connected(a); }),
         "a connection; " + a.wire->trouble_of(b.nonce) + "; " + b.wire->trouble_of(a.nonce), where);
}

FrameHeader header_of(uint32_t number) {
  FrameHeader header;
  header.type = FrameType::message;
  header.group = kGroup;
  header.number = number;
  header.sequence = 1'000 + number;
  header.source = 3;
  header.destination = 5;
  return header;
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

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i)
    if (dlopen(argv[i], RTLD_NOW) == nullptr) std::printf("FAILED: %s\n", dlerror());
  return run({
      {"frames arrive whole and in order, both ways, in each mode",
       frames_arrive_whole_and_in_order_both_ways_in_each_mode},
      {"a lost process is told once, with its nonce, on both kinds of ends",
       a_lost_process_is_told_once_with_its_nonce_on_both_kinds_of_ends},
  });
}

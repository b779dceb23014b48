// Unit test of what the wire ignores: other secrets, other versions, garbage, forged, replayed and malformed frames.
//
// In each case a peer that behaves goes on. Arguments: libraries to load first.
#include <arpa/inet.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <string>

#include "tests/wire_host.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

// What is printed on stderr meanwhile.
class Captured {
 public:
  Captured() : before_(dup(2)), file_(std::tmpfile()) { dup2(fileno(file_), 2); }
  ~Captured() {
    dup2(before_, 2);
    close(before_);
    std::fclose(file_);
  }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;
  std::string text() const {
    std::string text(1 << 16, '\0');
    text.resize(static_cast<size_t>(std::max<ssize_t>(0, pread(fileno(file_), text.data(), text.size(), 0))));
    return text;
  }
  int count(const std::string& words) const {
    const std::string all = text();
    int n = 0;
    for (size_t at = all.find(words); at != std::string::npos; at = all.find(words, at + 1)) ++n;
    return n;
  }

 private:
  int before_;
  std::FILE* file_;
};

// A socket of libzmq that says what it likes, in its own name.
class Forger {
 public:
  explicit Forger(int type) : zmq_(ZmqLibrary::load()), context_(zmq_.ctx_new()), socket_(zmq_.socket(context_, type)) {
    const int linger = 0;
    zmq_.setsockopt(socket_, zmq::kLinger, &linger, sizeof linger);
  }
  ~Forger() {
    zmq_.close(socket_);
    zmq_.ctx_term(context_);
  }
  Forger(const Forger&) = delete;
  Forger& operator=(const Forger&) = delete;
  void connect(const std::string& address) const { zmq_.connect(socket_, address.c_str()); }
  std::string listen() const {
    char address[64];
    size_t nbytes = sizeof address;
    zmq_.bind(socket_, "tcp://127.0.0.1:*");
    zmq_.getsockopt(socket_, zmq::kLastEndpoint, address, &nbytes);
    return address;
  }
  void say(const std::vector<std::string>& parts) const {
    for (const std::string& part : parts)
      expect(zmq_.send(socket_, part.data(), part.size(), &part == &parts.back() ? 0 : zmq::kSendMore) >= 0, "it said");
  }
  // All parts of what comes next; empty while there is nothing.
  std::vector<std::string> hear() const {
    std::vector<std::string> parts;
    for (bool more = true; more;) {
      Payload part;
      if (zmq_.msg_recv(part.message(), socket_, zmq::kDontWait) < 0) return parts;
      parts.emplace_back(reinterpret_cast<const char*>(part.data()), part.size());
      more = zmq_.msg_more(part.message()) != 0;
    }
    return parts;
  }

 private:
  const ZmqLibrary& zmq_;
  void* context_;
  void* socket_;
};

std::string bytes_of(const void* data, size_t nbytes) { return {static_cast<const char*>(data), nbytes}; }

// The parts of a frame as the wire makes them; `change` may spoil the header before its checksum is made.
std::vector<std::string> parts_of(FrameHeader header, const std::string& payload, FrameTags* tags = nullptr,
                                  const std::function<void(FrameHeader&)>& change = {}) {
  header.magic = kFrameMagic;
  header.version = kWireVersion;
  header.payload_bytes = static_cast<uint32_t>(payload.size());
  if (change) change(header);
  header.crc = crc_of(header);
  std::string head = bytes_of(&header, sizeof header);
  if (tags != nullptr) {
    const Tag tag = tags->next(header, payload.data(), payload.size());
    tags->advance();
    head += bytes_of(tag.data(), tag.size());
  }
  return {head, payload};
}

std::vector<std::string> hello_of(const Nonce& from, const Nonce& to, FrameTags* tags = nullptr,
                                  const std::function<void(FrameHeader&)>& change = {}) {
  FrameHeader header;
  header.type = FrameType::hello;
  return parts_of(header, bytes_of(from.data(), from.size()) + bytes_of(to.data(), to.size()), tags, change);
}

// Two hosts that go on whatever a third one does to the second of them.
struct Pair {
  explicit Pair(WireSecurity::Mode mode) : a(1, security_of(mode, 7)), b(5, security_of(mode, 7)) {
    expect_connected(a, b);
  }
  void expect_going_on(const std::source_location where = std::source_location::current()) {
    const size_t before = b.records->frames.size();
    expect(a.wire->send(b.nonce, header_of(1), "right", 5), "a frame sent", where);
    const bool came = pump_until({&a, &b}, [&] { return b.records->frames.size() == before + 1; });
    expect(came && b.records->frames.back().bytes == "right", "the right peer to go on", where);
    expect(a.records->losses.empty() && b.records->losses.empty(), "nobody lost", where);
  }
  bool b_ignored(uint64_t n) {
    return pump_until({&a, &b}, [&] { return b.wire->ignored_frames() >= n; }) && b.wire->ignored_frames() == n;
  }
  Host a, b;
};

void another_secret_is_ignored_and_said_once() {
  for (const auto mode : {WireSecurity::Mode::curve, WireSecurity::Mode::mac}) {
    const Captured captured;
    Pair pair(mode);
    for (int visit = 0; visit < 3; ++visit) {
      Host stranger(0, security_of(mode, 8));
      stranger.wire->connect(pair.b.nonce, pair.b.wire->address());
      expect(pump_until({&pair.a, &pair.b, &stranger},
                        [&] {
                          return stranger.wire->trouble_of(pair.b.nonce).find("another secret") != std::string::npos &&
                                 !pair.b.wire->trouble_of(stranger.nonce).empty();
                        }),
             "a reason on its side: " + stranger.wire->trouble_of(pair.b.nonce));
      expect(!stranger.is_connected(pair.b) && !pair.b.is_connected(stranger), "no connection");
      expect(!stranger.wire->send(pair.b.nonce, header_of(0), "x", 1), "nothing sent");
    }
    pair.expect_going_on();
    // Or two: who has hung up before we look at the event has no address any more.
    const int lines = captured.count("hxcomm: ignored");
    expect(lines == 1 || (lines == 2 && captured.count("no longer known") == 1), "one line: " + captured.text());
    expect(pair.b.wire->trouble_of(Nonce{0}).find("the last to connect to us, from ") == 0,
           "what is known on b's side: " + pair.b.wire->trouble_of(Nonce{0}));
  }
}

void a_client_key_of_another_job_is_ignored() {
  const Captured captured;
  Pair pair(WireSecurity::Mode::curve);
  WireSecurity security = security_of(WireSecurity::Mode::curve, 8);
  security.server_public = security_of(WireSecurity::Mode::curve, 7).server_public;  // as if it had leaked
  Host stranger(0, security);
  stranger.wire->connect(pair.b.nonce, pair.b.wire->address());
  expect(pump_until({&pair.a, &pair.b, &stranger}, [&] { return captured.count("another secret") == 1; }),
         "a line about it: " + captured.text());
  expect(!stranger.is_connected(pair.b), "no connection");
  pair.expect_going_on();
}

void modes_that_differ_do_not_connect() {
  const Captured captured;
  for (const auto mode : kModes)
    for (const auto other : kModes) {
      if (mode == other) continue;
      Pair pair(mode);
      Host stranger(0, security_of(other, 7));
      stranger.wire->connect(pair.b.nonce, pair.b.wire->address());
      const auto refused = [&] {
        return !stranger.wire->trouble_of(pair.b.nonce).empty() && !pair.b.wire->trouble_of(stranger.nonce).empty();
      };
      expect(pump_until({&pair.a, &pair.b, &stranger}, refused), "a reason on both sides");
      expect(!stranger.is_connected(pair.b) && !pair.b.is_connected(stranger), "no connection");
      pair.expect_going_on();
    }
}

// A TCP connection to a wire that is not ZeroMQ's.
class Raw {
 public:
  explicit Raw(const std::string& address) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
    inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
    expect(::connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0, "a connection");
  }
  ~Raw() { close(fd_); }
  Raw(const Raw&) = delete;
  Raw& operator=(const Raw&) = delete;
  void say(const std::string& bytes) const {
    expect(::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()), "it said");
  }
  bool is_hung_up_on() const {
    pollfd waiting{fd_, POLLIN, 0};
    char bytes[4096];
    while (poll(&waiting, 1, 20'000) == 1)
      if (recv(fd_, bytes, sizeof bytes, 0) <= 0) return true;
    return false;
  }

 private:
  int fd_;
};

void who_does_not_speak_our_protocol_disturbs_nobody() {
  const Captured captured;
  for (const auto mode : kModes) {
    Pair pair(mode);
    const std::string address = pair.b.wire->address();
    const Raw silent(address);
    for (int i = 0; i < 20; ++i) const Raw scan(address);
    for (const std::string& garbage :
         {std::string("GET / HTTP/1.1\r\n\r\n"), std::string(100'000, '\xFF'),
          std::string("\xFF\0\0\0\0\0\0\0\x01\x7F\x03\0NONSENSE", 20) + std::string(60, 'n'),
          std::string("\x01\0", 2)}) {
      const Raw visitor(address);
      visitor.say(garbage);
      pair.expect_going_on();
    }
    Host late(3, security_of(mode, 7));
    expect_connected(late, pair.b);
    pair.expect_going_on();
  }
}

void another_version_is_named_on_both_sides() {
  const Captured captured;
  const auto newer = [](FrameHeader& header) { header.version = 2; };
  for (const auto mode : {WireSecurity::Mode::none, WireSecurity::Mode::mac}) {
    Pair pair(mode);
    const Forger visitor(zmq::kDealer);
    visitor.connect(pair.b.wire->address());
    visitor.say(hello_of(Nonce{0}, pair.b.nonce, nullptr, newer));
    std::vector<std::string> answer;
    expect(pump_until({&pair.a, &pair.b}, [&] { return !(answer = visitor.hear()).empty(); }), "an answer");
    FrameHeader header;
    std::memcpy(&header, answer.at(0).data(), sizeof header);
    expect(header.type == FrameType::hello && header.version == 1, "a hello that says which version we speak");
    expect(
        pair.b.wire->trouble_of(Nonce{0}).find("version 2 of the wire protocol, this process 1") != std::string::npos,
        pair.b.wire->trouble_of(Nonce{0}));

    const Forger listener(zmq::kRouter);
    const Nonce other{9};
    pair.b.wire->connect(other, listener.listen());
    std::vector<std::string> heard;
    expect(pump_until({&pair.a, &pair.b}, [&] { return !(heard = listener.hear()).empty(); }), "our hello");
    std::vector<std::string> reply = hello_of(other, pair.b.nonce, nullptr, newer);
    reply.insert(reply.begin(), heard.at(0));
    listener.say(reply);
    const auto named = [&] { return pair.b.wire->trouble_of(other).find("it speaks version 2") == 0; };
    expect(pump_until({&pair.a, &pair.b}, named), "the version: " + pair.b.wire->trouble_of(other));
    expect(!pair.b.wire->is_connected(other), "no connection");
    pair.expect_going_on();
  }
}

void a_malformed_frame_is_counted_and_said_once_and_the_next_is_taken() {
  const Captured captured;
  Pair pair(WireSecurity::Mode::none);
  const Nonce self{2};
  const Forger forger(zmq::kDealer);
  forger.connect(pair.b.wire->address());
  const std::vector<std::string> good = parts_of(header_of(4), "good");
  forger.say(good);  // before its hello
  expect(pair.b_ignored(1), "what comes before a hello ignored");
  forger.say(hello_of(self, Nonce{6}));  // for another process, say the one that was here before
  forger.say(good);
  expect(pair.b_ignored(3), "a hello for another process ignored, and what follows it");
  forger.say(hello_of(Nonce{200}, pair.b.nonce));  // it is ours to connect to that one
  forger.say(hello_of(pair.a.nonce, pair.b.nonce));
  expect(pair.b_ignored(5), "hellos in the name of others ignored");
  forger.say(hello_of(self, pair.b.nonce));
  const auto with = [](const std::function<void(FrameHeader&)>& change) {
    return parts_of(header_of(4), "bad", nullptr, change);
  };
  std::string flipped = good[0];
  flipped[20] ^= 4;
  const std::vector<std::vector<std::string>> malformed = {
      {""},
      {good[0]},
      {good[0].substr(0, 63), good[1]},
      {good[0] + "x", good[1]},
      {good[0], good[1], "more"},
      {flipped, good[1]},
      {good[0], "goo"},
      {good[0], "goods"},
      {"", "", ""},
      with([](FrameHeader& header) { header.magic ^= 1; }),
      with([](FrameHeader& header) { header.version = 0; }),
      with([](FrameHeader& header) { header.type = FrameType{0}; }),
      with([](FrameHeader& header) { header.type = FrameType{kLastFrameType + 1}; }),
      with([](FrameHeader& header) { header.group = 0; }),
      with([](FrameHeader& header) { header.type = FrameType::hello; }),
      with([](FrameHeader& header) { header.payload_bytes = 0; }),
      with([](FrameHeader& header) { header.group = kGroup + 1; }),
  };
  for (const auto& parts : malformed) forger.say(parts);
  for (const auto& parts : malformed) forger.say(parts);
  forger.say(good);
  expect(pair.b_ignored(5 + 2 * malformed.size()),
         "each ignored, not " + std::to_string(pair.b.wire->ignored_frames()));
  expect(pump_until({&pair.a, &pair.b}, [&] { return !pair.b.records->frames.empty(); }), "the good one");
  expect(pair.b.records->frames.size() == 1 && pair.b.records->frames[0].bytes == "good" &&
             pair.b.records->frames[0].from == self,
         "the good one and no other");
  expect(captured.count("too few or too many bytes") == 1 && captured.count("wrong checksum") == 1 &&
             captured.count("no frame") == 1 && captured.count("unknown type") == 1,
         "one line for each kind: " + captured.text());
  pair.expect_going_on();
}

void a_frame_that_is_forged_replayed_or_left_out_is_ignored_in_mode_mac() {
  const Captured captured;
  Pair pair(WireSecurity::Mode::mac);
  const Nonce self{2};
  const Key key = security_of(WireSecurity::Mode::mac, 7).mac_key;
  FrameTags tags(key, self, pair.b.nonce);
  const Forger forger(zmq::kDealer);
  forger.connect(pair.b.wire->address());
  const std::vector<std::string> hello = hello_of(self, pair.b.nonce, &tags);
  const std::vector<std::string> first = parts_of(header_of(1), "first", &tags);
  FrameTags skipping = tags;
  skipping.advance();
  forger.say(hello);
  forger.say(first);
  expect(pump_until({&pair.a, &pair.b}, [&] { return pair.b.records->frames.size() == 1; }), "the first frame");
  FrameTags other_key(security_of(WireSecurity::Mode::mac, 8).mac_key, self, pair.b.nonce);
  FrameTags other_way(key, pair.b.nonce, self);
  FrameTags now = tags;
  std::vector<std::string> changed = parts_of(header_of(2), "second", &now);
  changed[1][0] = 'S';
  forger.say(first);  // replayed
  forger.say(hello);
  forger.say(changed);
  forger.say(parts_of(header_of(2), "second"));              // without a tag
  forger.say(parts_of(header_of(2), "second", &other_key));  // by somebody else
  forger.say(parts_of(header_of(2), "second", &other_way));  // our own, reflected
  forger.say(parts_of(header_of(2), "second", &skipping));   // after one that was left out
  expect(pair.b_ignored(7), "each ignored, not " + std::to_string(pair.b.wire->ignored_frames()));
  forger.say(parts_of(header_of(2), "second", &tags));
  expect(pump_until({&pair.a, &pair.b}, [&] { return pair.b.records->frames.size() == 2; }), "the second frame");
  expect(pair.b.records->frames.back().bytes == "second" && pair.b.wire->ignored_frames() == 7, "none but the two");

  const Forger again(zmq::kDealer);  // a recorded conversation, played on a connection of its own
  again.connect(pair.b.wire->address());
  again.say(hello);
  again.say(first);
  expect(pair.b_ignored(9), "a conversation played again ignored");
  expect(captured.count("a frame that is not authentic") == 1, "one line: " + captured.text());
  pair.expect_going_on();
}

void a_process_that_was_lost_does_not_come_back() {
  const Captured captured;
  Pair pair(WireSecurity::Mode::none);
  const Nonce self{2};
  {
    const Forger forger(zmq::kDealer);
    forger.connect(pair.b.wire->address());
    forger.say(hello_of(self, pair.b.nonce));
    expect(pump_until({&pair.a, &pair.b}, [&] { return pair.b.wire->is_connected(self); }), "a connection");
  }
  expect(pump_until({&pair.a, &pair.b}, [&] { return pair.b.records->losses.size() == 1; }), "its loss");
  pair.b.records->losses.clear();
  const Forger again(zmq::kDealer);
  again.connect(pair.b.wire->address());
  again.say(hello_of(self, pair.b.nonce));
  again.say(parts_of(header_of(1), "late"));
  expect(pair.b_ignored(2), "its hello and its frame ignored");
  expect(!pair.b.wire->is_connected(self) && pair.b.records->frames.empty(), "a lost process to stay lost");
  pair.expect_going_on();
}

}  // namespace

int main(int argc, char** argv) {
  load_libraries(argc, argv);
  return run({
      {"another secret is ignored and said once", another_secret_is_ignored_and_said_once},
      {"a client key of another job is ignored", a_client_key_of_another_job_is_ignored},
      {"modes that differ do not connect", modes_that_differ_do_not_connect},
      {"who does not speak our protocol disturbs nobody", who_does_not_speak_our_protocol_disturbs_nobody},
      {"another version is named on both sides", another_version_is_named_on_both_sides},
      {"a malformed frame is counted and said once, and the next is taken",
       a_malformed_frame_is_counted_and_said_once_and_the_next_is_taken},
      {"a frame that is forged, replayed or left out is ignored in mode mac",
       a_frame_that_is_forged_replayed_or_left_out_is_ignored_in_mode_mac},
      {"a process that was lost does not come back", a_process_that_was_lost_does_not_come_back},
  });
}

// The wire's own thread. It lets connections in that know the job's secret (CURVE alone lets in any key), and it finds
// silent hosts, also while nobody pumps.
//
// Silent is a connection whose data the other kernel has not acknowledged for two seconds: the cable, the network or
// the host is gone. A stopped process is not silent, its kernel goes on acknowledging. TCP_USER_TIMEOUT does not tell
// the two apart: it also ends a connection whose receiver has no room, which a stopped one soon has not. So we ask the
// kernel (TCP_INFO) four times a second; libzmq's heartbeats see to it that there is always something to acknowledge.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "transport/wire_security.h"

namespace hxcomm {

// The address at the other (or the own) end of a TCP socket; "" where there is none.
std::string remote_address(int fd);

class WireWatch {
 public:
  // Before any socket of `context` is bound. Throws Error{init}.
  WireWatch(void* context, const WireSecurity& security);
  ~WireWatch();
  WireWatch(const WireWatch&) = delete;
  WireWatch& operator=(const WireWatch&) = delete;

  void add(int fd);
  bool remove(int fd);  // true: it was silent, and this closed it

 private:
  struct Connection {
    int fd = -1;
    sockaddr_storage own{}, other{};
    int64_t looked_ns = 0, silent_since_ns = 0;
    bool silent = false;
  };
  struct Fork;
  void run();
  void answer_zap();
  void look_at_all();
  static bool is_still(const Connection& connection, int fd);
  static void look(Connection& connection, int64_t now);

  const ZmqLibrary& zmq_;
  Key allowed_;
  void* zap_ = nullptr;  // null: no CURVE
  int zap_fd_ = -1;
  int stop_event_ = -1;
  std::mutex mutex_;
  std::vector<Connection> connections_;
  std::thread thread_;
};

}  // namespace hxcomm

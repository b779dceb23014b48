// libzmq and libsodium, found at run time: hxcomm is built without their headers and runs on one host without them.
//
// Python has usually loaded a libzmq already (`import zmq`: pyzmq's wheels bring one, and libsodium beside it), and
// that one is used; else the system's. Only the functions and numbers that the wire needs are declared: they are
// libzmq's stable interface, the same since 4.2.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hxcomm {

struct alignas(8) ZmqMessage {  // zmq_msg_t
  unsigned char opaque[64];
};

namespace zmq {

enum SocketType : int { kPair = 0, kRep = 4, kDealer = 5, kRouter = 6 };
enum Option : int {
  kFd = 14,
  kEvents = 15,
  kLinger = 17,
  kReconnectIvl = 18,
  kBacklog = 19,
  kMaxMsgSize = 22,
  kSendHwm = 23,
  kReceiveHwm = 24,
  kLastEndpoint = 32,
  kRouterMandatory = 33,
  kIpv6 = 42,
  kCurveServer = 47,
  kCurvePublicKey = 48,
  kCurveSecretKey = 49,
  kCurveServerKey = 50,
  kConnectRoutingId = 61,
  kHandshakeIvl = 66,
  kHeartbeatIvl = 75,
  kHeartbeatTimeout = 77,
  kConnectTimeout = 79,
};
enum ContextOption : int { kIoThreads = 1 };
enum Flag : int { kDontWait = 1, kSendMore = 2 };
enum MessageProperty : int { kMore = 1, kSourceFd = 2 };
enum Event : uint16_t {
  kConnected = 0x1,
  kAccepted = 0x20,
  kClosed = 0x80,
  kDisconnected = 0x200,
  kHandshakeFailedNoDetail = 0x800,
  kHandshakeFailedProtocol = 0x2000,
  kHandshakeFailedAuth = 0x4000,
};
constexpr short kPollIn = 1;

}  // namespace zmq

struct ZmqLibrary {
  // Throws Error{init} that says where it was looked for and what to install. Found once per process.
  static const ZmqLibrary& load();

  void* (*ctx_new)();
  int (*ctx_set)(void* context, int option, int value);
  int (*ctx_term)(void* context);
  void* (*socket)(void* context, int type);
  int (*close)(void* socket);
  int (*setsockopt)(void* socket, int option, const void* value, size_t nbytes);
  int (*getsockopt)(void* socket, int option, void* value, size_t* nbytes);
  int (*bind)(void* socket, const char* endpoint);
  int (*connect)(void* socket, const char* endpoint);
  int (*disconnect)(void* socket, const char* endpoint);
  int (*socket_monitor)(void* socket, const char* endpoint, int events);
  int (*send)(void* socket, const void* data, size_t nbytes, int flags);
  int (*msg_init)(ZmqMessage*);
  int (*msg_init_size)(ZmqMessage*, size_t nbytes);
  int (*msg_init_data)(ZmqMessage*, void* data, size_t nbytes, void (*release)(void* data, void* hint), void* hint);
  int (*msg_send)(ZmqMessage*, void* socket, int flags);
  int (*msg_recv)(ZmqMessage*, void* socket, int flags);
  int (*msg_close)(ZmqMessage*);
  int (*msg_move)(ZmqMessage* to, ZmqMessage* from);
  int (*msg_copy)(ZmqMessage* to, ZmqMessage* from);
  void* (*msg_data)(ZmqMessage*);
  size_t (*msg_size)(const ZmqMessage*);
  int (*msg_more)(const ZmqMessage*);
  int (*msg_get)(const ZmqMessage*, int property);
  int (*curve_public)(char* public_key_z85, const char* secret_key_z85);
  char* (*z85_encode)(char* text, const uint8_t* data, size_t nbytes);
  uint8_t* (*z85_decode)(uint8_t* data, const char* text);
  const char* (*strerror)(int error);
  void (*version)(int* major, int* minor, int* patch);
};

struct SodiumLibrary {
  static const SodiumLibrary& load();  // as ZmqLibrary::load()

  int (*init)();
  int (*auth_hmacsha256)(unsigned char out[32], const unsigned char* in, unsigned long long nbytes,
                         const unsigned char key[32]);
  int (*stream_chacha20_ietf)(unsigned char* out, unsigned long long nbytes, const unsigned char nonce[12],
                              const unsigned char key[32]);
  int (*onetimeauth_poly1305_init)(void* state, const unsigned char key[32]);
  int (*onetimeauth_poly1305_update)(void* state, const unsigned char* in, unsigned long long nbytes);
  int (*onetimeauth_poly1305_final)(void* state, unsigned char tag[16]);
  size_t (*onetimeauth_poly1305_statebytes)();
};

}  // namespace hxcomm

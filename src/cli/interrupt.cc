// Ctrl-C (interrupt.h).
#include "cli/interrupt.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>

namespace thriftattn::cli {
namespace {

// A signal handler can reach nothing but globals.
volatile sig_atomic_t g_interrupted = 0;
int g_wake[2] = {-1, -1};  // a pipe: written by the handler, waited for beside standard input

void on_interrupt(int) {
  const int saved = errno;
  g_interrupted = 1;
  const char byte = 0;
  [[maybe_unused]] const ssize_t written = write(g_wake[1], &byte, 1);
  errno = saved;
}

}  // namespace

InterruptHandler::InterruptHandler() {
  g_interrupted = 0;
  // Without a pipe (no descriptors left) Ctrl-C is still seen, at the end of a line.
  if (pipe2(g_wake, O_CLOEXEC | O_NONBLOCK) != 0) g_wake[0] = g_wake[1] = -1;
  struct sigaction action = {};
  action.sa_handler = on_interrupt;
  action.sa_flags = SA_RESETHAND;  // the second signal has its default effect
  sigaction(SIGINT, &action, nullptr);
}

InterruptHandler::~InterruptHandler() {
  signal(SIGINT, SIG_DFL);
  for (int& descriptor : g_wake) {
    if (descriptor >= 0) close(descriptor);
    descriptor = -1;
  }
}

bool InterruptHandler::interrupted() { return g_interrupted != 0; }

bool InterruptHandler::wait_readable(int descriptor) const {
  pollfd wait[2] = {{.fd = descriptor, .events = POLLIN, .revents = 0},
                    {.fd = g_wake[0], .events = POLLIN, .revents = 0}};
  while (!interrupted()) {
    const int ready = poll(wait, 2, -1);
    if (ready < 0 && errno != EINTR) return !interrupted();  // reading reports what is wrong
    if (ready > 0 && wait[0].revents != 0) return !interrupted();
  }
  return false;
}

}  // namespace thriftattn::cli

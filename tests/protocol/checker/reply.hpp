// What a command or a script answers, and what it does that leaves no trace in the keyspace.
#pragma once

#include "keyspace.hpp"

struct Reply {
  char type = 'n';  // n nothing, i integer, s text, k status, a array, e error
  long long integer = 0;
  string text;
  vector<Reply> items;

  static Reply of(char type, const string& text) {
    Reply reply;
    reply.type = type;
    reply.text = text;
    return reply;
  }
  static Reply nothing() { return Reply(); }
  static Reply array() { return of('a', ""); }
  static Reply status(const string& text) { return of('k', text); }
  static Reply error(const string& text) { return of('e', text); }
  static Reply bulk(const string& text) { return of('s', text); }
  static Reply number(long long integer) {
    Reply reply;
    reply.type = 'i';
    reply.integer = integer;
    return reply;
  }
};

inline string json_reply(const Reply& reply) {
  switch (reply.type) {
    case 'n': return "null";
    case 'i': return std::to_string(reply.integer);
    case 's':
    case 'k': return json_text(reply.text);
    case 'e': return "{\"err\":" + json_text(reply.text) + "}";
    default: return json_items(reply.items, '[', ']', json_reply);
  }
}

// What a script does that leaves no trace in the keyspace, or that the monitors want to see as an event.
struct Effect {
  char kind;  // P published, X appended to a stream, L pushed at the left, R pushed at the right
  string where, what;
};

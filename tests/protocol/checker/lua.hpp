// Lua 5.1 with the functions that a script finds on Redis: it runs the real .lua files.
#pragma once

#include <fstream>
#include <sstream>

#include "commands.hpp"
#include "sha1.hpp"

extern "C" {
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>
}

// ---- MessagePack, as far as the scripts' arguments need it

inline string packed(const string& text) {
  string out;
  if (text.size() < 32) {
    out += static_cast<char>(0xa0 | text.size());
  } else if (text.size() < 256) {
    out += static_cast<char>(0xd9);
    out += static_cast<char>(text.size());
  } else {
    out += static_cast<char>(0xda);
    out += static_cast<char>(text.size() >> 8);
    out += static_cast<char>(text.size() & 255);
  }
  return out + text;
}

inline string packed(int number) {  // 0 to 127, or 32 bits
  if (number < 128) return string(1, static_cast<char>(number));
  string out(1, static_cast<char>(0xce));
  for (int byte = 3; byte >= 0; byte--) out += static_cast<char>((number >> (8 * byte)) & 255);
  return out;
}

inline string packed_array(const vector<string>& packed_items) {
  if (packed_items.size() > 15) {
    fprintf(stderr, "an array of over 15 items is not packed here\n");
    exit(4);
  }
  string out(1, static_cast<char>(0x90 | packed_items.size()));
  for (const auto& item : packed_items) out += item;
  return out;
}

inline size_t push_unpacked(lua_State* lua, const unsigned char* at) {  // returns how many bytes it took
  unsigned char head = *at;
  auto text = [&](size_t header, size_t length) {
    lua_pushlstring(lua, reinterpret_cast<const char*>(at + header), length);
    return header + length;
  };
  if (head < 0x80) {
    lua_pushnumber(lua, head);
    return 1;
  }
  if ((head & 0xe0) == 0xa0) return text(1, head & 31);
  if (head == 0xd9) return text(2, at[1]);
  if (head == 0xda) return text(3, static_cast<size_t>(at[1]) << 8 | at[2]);
  if (head == 0xce) {
    lua_pushnumber(lua, static_cast<uint32_t>(at[1]) << 24 | at[2] << 16 | at[3] << 8 | at[4]);
    return 5;
  }
  if ((head & 0xf0) == 0x90) {
    size_t taken = 1;
    lua_newtable(lua);
    for (int n = 1; n <= (head & 15); n++) {
      taken += push_unpacked(lua, at + taken);
      lua_rawseti(lua, -2, n);
    }
    return taken;
  }
  fprintf(stderr, "MessagePack of this form is not read here: %02x\n", head);
  exit(5);
}

// ---- replies and arguments

inline Commands* broker_of_scripts = nullptr;  // Lua's functions have no other way to find it

inline void push_reply(lua_State* lua, const Reply& reply) {
  auto table = [&](const char* name) {
    lua_newtable(lua);
    lua_pushlstring(lua, reply.text.data(), reply.text.size());
    lua_setfield(lua, -2, name);
  };
  switch (reply.type) {
    case 'n': lua_pushboolean(lua, 0); break;
    case 'i': lua_pushnumber(lua, static_cast<lua_Number>(reply.integer)); break;
    case 's': lua_pushlstring(lua, reply.text.data(), reply.text.size()); break;
    case 'k': table("ok"); break;
    case 'e': table("err"); break;
    default:
      lua_newtable(lua);
      for (size_t n = 0; n < reply.items.size(); n++) {
        push_reply(lua, reply.items[n]);
        lua_rawseti(lua, -2, static_cast<int>(n) + 1);
      }
  }
}

inline Reply run_command(lua_State* lua) {
  Words words;
  for (int n = 1; n <= lua_gettop(lua); n++) {
    if (lua_type(lua, n) == LUA_TNUMBER) {
      words.push_back(number_text(lua_tonumber(lua, n)));
    } else if (lua_type(lua, n) == LUA_TSTRING) {
      size_t length;
      const char* text = lua_tolstring(lua, n, &length);
      words.emplace_back(text, length);
    } else {
      return Reply::error("ERR Command arguments must be strings or integers");
    }
  }
  return broker_of_scripts->run(words);
}

inline int lua_call_command(lua_State* lua) {
  {
    Reply reply = run_command(lua);
    if (reply.type != 'e') {
      push_reply(lua, reply);
      return 1;
    }
    lua_pushlstring(lua, reply.text.data(), reply.text.size());
  }  // lua_error jumps over destructors
  return lua_error(lua);
}

inline int lua_pcall_command(lua_State* lua) {
  push_reply(lua, run_command(lua));
  return 1;
}

inline int lua_error_reply(lua_State* lua) {
  lua_newtable(lua);
  lua_pushvalue(lua, 1);
  lua_setfield(lua, -2, "err");
  return 1;
}

inline int lua_json_encode(lua_State* lua) {
  string text = json_text(luaL_checkstring(lua, 1));
  lua_pushlstring(lua, text.data(), text.size());
  return 1;
}

inline int lua_unpack(lua_State* lua) {
  push_unpacked(lua, reinterpret_cast<const unsigned char*>(luaL_checkstring(lua, 1)));
  return 1;
}

// MessagePack of arrays, texts and small numbers.
inline string packed_value(lua_State* lua, int at) {
  if (lua_type(lua, at) == LUA_TNUMBER) return packed(static_cast<int>(lua_tonumber(lua, at)));
  if (lua_type(lua, at) == LUA_TSTRING) return packed(string(lua_tostring(lua, at)));
  vector<string> items;
  for (int n = 1; lua_istable(lua, at); n++) {
    lua_rawgeti(lua, at, n);
    bool is_end = lua_isnil(lua, -1);
    if (!is_end) items.push_back(packed_value(lua, lua_gettop(lua)));
    lua_pop(lua, 1);
    if (is_end) break;
  }
  return packed_array(items);
}

inline int lua_pack(lua_State* lua) {
  string text = packed_value(lua, 1);
  lua_pushlstring(lua, text.data(), text.size());
  return 1;
}

inline int lua_sha1hex(lua_State* lua) {
  size_t length;
  const char* text = luaL_checklstring(lua, 1, &length);
  string digest = sha1_hex(string(text, length));
  lua_pushlstring(lua, digest.data(), digest.size());
  return 1;
}

inline Reply reply_from(lua_State* lua, int at) {
  auto field = [&](const char* name, string& into) {
    lua_getfield(lua, at, name);
    bool found = lua_isstring(lua, -1);
    if (found) into = lua_tostring(lua, -1);
    lua_pop(lua, 1);
    return found;
  };
  switch (lua_type(lua, at)) {
    case LUA_TNUMBER: return Reply::number(static_cast<long long>(lua_tonumber(lua, at)));
    case LUA_TSTRING: {
      size_t length;
      const char* text = lua_tolstring(lua, at, &length);
      return Reply::bulk(string(text, length));
    }
    case LUA_TBOOLEAN: return lua_toboolean(lua, at) ? Reply::number(1) : Reply::nothing();
    case LUA_TTABLE: {
      string text;
      if (field("err", text)) return Reply::error(text);
      if (field("ok", text)) return Reply::status(text);
      Reply reply = Reply::array();
      for (int n = 1;; n++) {
        lua_rawgeti(lua, at, n);
        if (lua_isnil(lua, -1)) {
          lua_pop(lua, 1);
          return reply;
        }
        reply.items.push_back(reply_from(lua, lua_gettop(lua)));
        lua_pop(lua, 1);
      }
    }
    default: return Reply::nothing();
  }
}

// ---- the scripts

class Scripts {
 public:
  explicit Scripts(Commands& broker) : lua_(luaL_newstate()) {
    broker_of_scripts = &broker;
    luaL_openlibs(lua_);
    library("redis", {{"call", lua_call_command},
                      {"pcall", lua_pcall_command},
                      {"error_reply", lua_error_reply},
                      {"sha1hex", lua_sha1hex}});
    library("cjson", {{"encode", lua_json_encode}});
    library("cmsgpack", {{"unpack", lua_unpack}, {"pack", lua_pack}});
  }

  // A script, with what stands before it.
  void load(const string& name, const vector<string>& paths) {
    std::stringstream text;
    text << "local NAMESPACE, CELERY, CHANNEL = '', '', ''\n";  // the model's keys have bare names
    for (const auto& path : paths) {
      std::ifstream file(path);
      if (!file) fail(path, "it is not there");
      text << file.rdbuf() << "\n";
    }
    if (luaL_loadbuffer(lua_, text.str().data(), text.str().size(), name.c_str())) fail(name, lua_tostring(lua_, -1));
    loaded_[name] = luaL_ref(lua_, LUA_REGISTRYINDEX);
  }

  Reply run(const string& name, const vector<string>& keys, const vector<string>& args) {
    global("KEYS", keys);
    global("ARGV", args);
    lua_rawgeti(lua_, LUA_REGISTRYINDEX, loaded_.at(name));
    bool failed = lua_pcall(lua_, 0, 1, 0) != 0;
    const char* error = failed ? lua_tostring(lua_, -1) : nullptr;
    Reply reply = failed ? Reply::error(error ? error : "?") : reply_from(lua_, lua_gettop(lua_));
    lua_settop(lua_, 0);
    return reply;
  }

 private:
  static void fail(const string& what, const char* why) {
    fprintf(stderr, "cannot load %s: %s\n", what.c_str(), why);
    exit(2);
  }

  void library(const char* name, const vector<std::pair<const char*, lua_CFunction>>& functions) {
    lua_newtable(lua_);
    for (const auto& [function_name, function] : functions) {
      lua_pushcfunction(lua_, function);
      lua_setfield(lua_, -2, function_name);
    }
    lua_setglobal(lua_, name);
  }

  void global(const char* name, const vector<string>& items) {
    lua_newtable(lua_);
    for (size_t n = 0; n < items.size(); n++) {
      lua_pushlstring(lua_, items[n].data(), items[n].size());
      lua_rawseti(lua_, -2, static_cast<int>(n) + 1);
    }
    lua_setglobal(lua_, name);
  }

  lua_State* lua_;
  std::map<string, int> loaded_;
};

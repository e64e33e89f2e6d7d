//! Python's pickles, protocols 2 to 5: plain values as they are, every other object as the call that
//! would make it. Nothing is called, so a pickle can do no harm but take memory.
//!
//! candle has a reader for PyTorch's own files, which knows no bytes, no sets and no long strings.

use std::{
    cell::RefCell,
    collections::HashMap,
    io::{BufRead, Read},
    rc::Rc,
};

/// A value. Small ones are kept small: a pickle may hold millions.
#[derive(Debug, Clone)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Text(Rc<String>),
    Bytes(Rc<Vec<u8>>),
    /// A tuple; a list; a set, whose order is the file's.
    Items(Rc<RefCell<Vec<Self>>>),
    Dict(Rc<RefCell<Vec<(Self, Self)>>>),
    /// A class or function, as `module.name`.
    Global(Rc<String>),
    Call(Rc<Call>),
    /// A float, or an integer of more than 64 bits: nobody here asks which.
    Number,
    /// Where a variable number of items begins.
    Mark,
}

/// An object by how it is made.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) callable: Value,
    pub(super) arguments: Value,
    /// What it is then given as its state.
    pub(super) state: RefCell<Value>,
}

impl Value {
    fn items(items: Vec<Self>) -> Self {
        Self::Items(Rc::new(RefCell::new(items)))
    }

    fn call(callable: Self, arguments: Self) -> Self {
        Self::Call(Rc::new(Call { callable, arguments, state: RefCell::new(Self::None) }))
    }

    /// The items of a tuple, list or set.
    pub(super) fn to_items(&self) -> Option<Vec<Self>> {
        match self {
            Self::Items(items) => Some(items.borrow().clone()),
            _ => None,
        }
    }

    /// A number that counts something.
    pub(super) fn to_size(&self) -> Option<usize> {
        match self {
            Self::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    /// A string's text.
    pub(super) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The arguments and the state of a call to `name`, a function's name without its module's.
    pub(super) fn called(&self, name: &str) -> Option<(Vec<Self>, Self)> {
        let Self::Call(call) = self else { return None };
        let Self::Global(global) = &call.callable else { return None };
        let (_, last) = global.rsplit_once('.')?;
        (last == name).then_some((call.arguments.to_items()?, call.state.borrow().clone()))
    }
}

/// Reads the next pickle.
pub(super) fn load(source: &mut dyn BufRead) -> Result<Value, String> {
    let mut machine = Machine { source, stack: Vec::new(), memo: HashMap::new() };
    loop {
        let op = machine.number::<1>()?[0];
        if op == b'.' {
            return machine.pop();
        }
        machine.step(op)?;
    }
}

struct Machine<'a> {
    source: &'a mut dyn BufRead,
    stack: Vec<Value>,
    memo: HashMap<u64, Value>,
}

impl Machine<'_> {
    /// Obeys one opcode; Python's `pickletools` says what each means.
    fn step(&mut self, op: u8) -> Result<(), String> {
        match op {
            0x80 => self.skip(1)?,                         // PROTO
            0x95 => self.skip(8)?,                         // FRAME
            b'(' => self.stack.push(Value::Mark),          // MARK
            b'0' => drop(self.pop()?),                     // POP
            b'1' => drop(self.marked()?),                  // POP_MARK
            b'2' => self.stack.push(self.top()?.clone()),  // DUP
            b'q' => self.put(1)?,                          // BINPUT
            b'r' => self.put(4)?,                          // LONG_BINPUT
            0x94 => self.memoize(self.memo.len() as u64)?, // MEMOIZE
            b'h' => self.get(1)?,                          // BINGET
            b'j' => self.get(4)?,                          // LONG_BINGET
            b'c' => self.global()?,                        // GLOBAL
            0x93 => self.stack_global()?,                  // STACK_GLOBAL
            b'R' | 0x81 => self.call()?,                   // REDUCE, NEWOBJ
            b'b' => self.build()?,                         // BUILD
            b'Q' => self.persistent()?,                    // BINPERSID
            0x97 | 0x98 => return Err("its arrays lie outside of it (out-of-band buffers)".into()),
            _ if self.container(op)? => {}
            _ => {
                let value = self.plain(op)?;
                self.stack.push(value);
            }
        }
        Ok(())
    }

    /// A value that is in the pickle itself.
    fn plain(&mut self, op: u8) -> Result<Value, String> {
        Ok(match op {
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' | b'M' => Value::Int(self.size(if op == b'K' { 1 } else { 2 })? as i64),
            b'J' => Value::Int(i32::from_le_bytes(self.number()?).into()),
            b'G' => self.number::<8>().map(|_| Value::Number)?,
            0x8a | 0x8b => self.long(if op == 0x8a { 1 } else { 4 })?,
            0x8c | b'X' | 0x8d => self.text(match op {
                0x8c => 1,
                b'X' => 4,
                _ => 8,
            })?,
            b'C' | b'U' => Value::Bytes(Rc::new(self.sized(1)?)),
            b'B' | b'T' => Value::Bytes(Rc::new(self.sized(4)?)),
            0x8e | 0x96 => Value::Bytes(Rc::new(self.sized(8)?)),
            _ => return Err(format!("opcode 0x{op:02x} is not one of protocols 2 to 5")),
        })
    }

    /// Makes or fills a tuple, list, set or dict, if that is what `op` does.
    fn container(&mut self, op: u8) -> Result<bool, String> {
        match op {
            b')' | b']' | 0x8f => self.stack.push(Value::items(Vec::new())),
            b't' | b'l' | 0x91 => {
                let items = self.marked()?;
                self.stack.push(Value::items(items));
            }
            0x85..=0x87 => {
                let from = self.stack.len().checked_sub(usize::from(op - 0x84)).ok_or(EMPTY)?;
                let items = self.stack.split_off(from);
                self.stack.push(Value::items(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.marked()?;
                self.append(items)?;
            }
            b'}' => self.stack.push(Value::Dict(Rc::default())),
            b'd' => {
                let items = self.marked()?;
                self.stack.push(Value::Dict(Rc::default()));
                self.insert(items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.insert(vec![key, value])?;
            }
            b'u' => {
                let items = self.marked()?;
                self.insert(items)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn append(&mut self, items: Vec<Value>) -> Result<(), String> {
        match self.top()? {
            Value::Items(list) => list.borrow_mut().extend(items),
            other => return Err(format!("items for {other:?}")),
        }
        Ok(())
    }

    fn insert(&mut self, items: Vec<Value>) -> Result<(), String> {
        match self.top()? {
            Value::Dict(dict) => {
                let mut items = items.into_iter();
                while let (Some(key), Some(value)) = (items.next(), items.next()) {
                    dict.borrow_mut().push((key, value));
                }
                Ok(())
            }
            // An OrderedDict and the like: what is in it does not matter here.
            Value::Call(_) => Ok(()),
            other => Err(format!("keys for {other:?}")),
        }
    }

    fn call(&mut self) -> Result<(), String> {
        let arguments = self.pop()?;
        let callable = self.pop()?;
        self.stack.push(Value::call(callable, arguments));
        Ok(())
    }

    fn build(&mut self) -> Result<(), String> {
        let state = self.pop()?;
        match self.top()? {
            Value::Call(call) => *call.state.borrow_mut() = state,
            other => return Err(format!("a state for {other:?}")),
        }
        Ok(())
    }

    fn persistent(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let name = Value::Global(Rc::new("pickle.persistent".into()));
        self.stack.push(Value::call(name, id));
        Ok(())
    }

    fn global(&mut self) -> Result<(), String> {
        let mut name = String::new();
        for _ in ["module", "name"] {
            if !name.is_empty() {
                name.push('.');
            }
            let mut line = Vec::new();
            Read::take(&mut *self.source, 1000)
                .read_until(b'\n', &mut line)
                .map_err(|e| e.to_string())?;
            name.push_str(String::from_utf8_lossy(&line).trim_end());
        }
        self.stack.push(Value::Global(Rc::new(name)));
        Ok(())
    }

    fn stack_global(&mut self) -> Result<(), String> {
        let (name, module) = (self.pop()?, self.pop()?);
        let (Some(name), Some(module)) = (name.as_text(), module.as_text()) else {
            return Err("a class whose name is no text".into());
        };
        self.stack.push(Value::Global(Rc::new(format!("{module}.{name}"))));
        Ok(())
    }

    fn put(&mut self, width: usize) -> Result<(), String> {
        let key = self.size(width)?;
        self.memoize(key)
    }

    fn memoize(&mut self, key: u64) -> Result<(), String> {
        let value = self.top()?.clone();
        self.memo.insert(key, value);
        Ok(())
    }

    fn get(&mut self, width: usize) -> Result<(), String> {
        let key = self.size(width)?;
        let value = self.memo.get(&key).ok_or_else(|| format!("no value number {key}"))?;
        self.stack.push(value.clone());
        Ok(())
    }

    fn top(&self) -> Result<&Value, String> {
        self.stack.last().ok_or_else(|| EMPTY.into())
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack.pop().ok_or_else(|| EMPTY.into())
    }

    /// What lies above the last mark, which goes.
    fn marked(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.stack.iter().rposition(|value| matches!(value, Value::Mark));
        let items = self.stack.split_off(mark.ok_or(EMPTY)? + 1);
        self.stack.pop();
        Ok(items)
    }

    fn long(&mut self, width: usize) -> Result<Value, String> {
        let bytes = self.sized(width)?;
        if bytes.len() > 8 {
            return Ok(Value::Number);
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut whole = [if negative { 0xff } else { 0 }; 8];
        whole[..bytes.len()].copy_from_slice(&bytes);
        Ok(Value::Int(i64::from_le_bytes(whole)))
    }

    fn text(&mut self, width: usize) -> Result<Value, String> {
        // Python may have put half of a surrogate pair there.
        let bytes = self.sized(width)?;
        Ok(Value::Text(Rc::new(String::from_utf8_lossy(&bytes).into_owned())))
    }

    fn skip(&mut self, width: usize) -> Result<(), String> {
        self.size(width).map(drop)
    }

    /// An unsigned number of `width` bytes.
    fn size(&mut self, width: usize) -> Result<u64, String> {
        let mut bytes = [0; 8];
        self.source.read_exact(&mut bytes[..width]).map_err(|e| e.to_string())?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.source.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    /// Bytes behind their number, which takes `width` bytes. No room is made before they are there.
    fn sized(&mut self, width: usize) -> Result<Vec<u8>, String> {
        let size = self.size(width)?;
        let mut bytes = Vec::new();
        Read::take(&mut *self.source, size).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        match bytes.len() as u64 == size {
            true => Ok(bytes),
            false => Err(format!("{size} bytes announced, {} there", bytes.len())),
        }
    }
}

const EMPTY: &str = "it takes more values than it has";

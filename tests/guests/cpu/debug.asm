; Debug registers, single steps and alignment checks (Intel SDM vol. 3, chapter on debugging, and 6.15 on #AC).
; Lines end with DR6 and with what the case counted in EBX.
%include "common.inc"
align 8
gdt:    usual_segments
        seg DATA0_TOO, 0, 0xfffff, 0x93, 0xc
gdt_end:

more:   mov ebx, dr6
        show " dr6=", ebx, 8
        show " b=", [esp + 4 + 16], 8
        mov ebx, dr7
        show " dr7=", ebx, 8
        mov eax, 0xffff0ff0
        mov dr6, eax
        mov eax, 0x400
        mov dr7, eax
        ret

; watch NUMBER, address, R/W, LEN: with its G bit
%macro watch 4
        mov eax, %2
        mov dr%1, eax
        mov eax, 0x400 | 2 << (2 * %1) | %3 << (16 + 4 * %1) | %4 << (18 + 4 * %1)
        mov dr7, eax
%endmacro
%macro data 5+ ; case NAME, R/W, LEN, address, access
        case %1
        watch 2, %4, %2, %3
        inc ebx
        %5
        inc ebx
        int 0x30
        end
%endmacro

start:  mov esp, STACK0
        call setup
        mov dword [SCRATCH], DATA0
        xor eax, eax
        mov cr4, eax

        case "instruction"
        watch 0, .at, 0, 0
        inc ebx
.at:    inc ebx
        inc ebx
        end
        case "instruction with RF"
        watch 1, .rf, 0, 0
        pushfd
        or dword [esp], 1 << 16
        push CODE0
        push .rf
        iretd
        nop
.rf:    inc ebx
        int 0x30
        end
        case "instruction reached again after RF"
        watch 1, .rf2, 0, 0
        pushfd
        or dword [esp], 1 << 16
        push CODE0
        push .rf2
        iretd
.rf2:   inc ebx
        jmp .rf2
        end
        case "instruction by a local bit"
        mov eax, .local
        mov dr3, eax
        mov eax, 0x440
        mov dr7, eax
        inc ebx
.local: inc ebx
        end
        case "not its first byte"
        watch 0, .inside + 1, 0, 0
.inside: mov eax, 5
        int 0x30
        end
        case "after a load of SS"
        watch 0, .shadow, 0, 0
        mov ax, DATA0_TOO
        mov ss, ax
.shadow: inc ebx
        inc ebx
        int 0x30
        end
        case "ud2 under a breakpoint"
        watch 0, .ud, 0, 0
.ud:    ud2
        end

        data "byte written", 1, 0, SCRATCH, mov byte [SCRATCH], 0x10
        data "byte read, watched for writes", 1, 0, SCRATCH, mov al, [SCRATCH]
        data "byte read", 3, 0, SCRATCH, mov al, [SCRATCH]
        data "byte beside", 3, 0, SCRATCH + 1, mov al, [SCRATCH]
        data "word over its second byte", 3, 0, SCRATCH + 1, mov ax, [SCRATCH]
        data "doubleword that begins before", 1, 1, SCRATCH + 2, mov [SCRATCH - 1], eax
        data "doubleword that ends before", 1, 1, SCRATCH + 4, mov [SCRATCH], eax
        data "address aligned down", 1, 3, SCRATCH + 3, mov [SCRATCH], al
        data "read and written", 1, 3, SCRATCH, inc dword [SCRATCH]
        data "two of them", 1, 3, SCRATCH, mov [SCRATCH], eax
        data "page across", 3, 0, SCRATCH + 0x1001, mov eax, [SCRATCH + 0xffe]
        case "two registers at once"
        mov eax, SCRATCH
        mov dr0, eax
        mov dr1, eax
        mov eax, 0x400 | 0xa | 0xf << 16 | 0xd << 20
        mov dr7, eax
        mov [SCRATCH], eax
        end
        case "string in the middle"
        watch 0, SCRATCH + 0x48, 1, 3
        mov edi, SCRATCH
        mov ecx, 100
        xor eax, eax
        rep stosd
        end
        case "string's last"
        watch 0, SCRATCH + 0x48, 1, 3
        mov edi, SCRATCH
        mov ecx, 0x13
        rep stosd
        inc ebx
        int 0x30
        end
        mov dword [SCRATCH], DATA0
        case "operand of a load of SS"
        watch 0, SCRATCH, 3, 1
        mov ss, [SCRATCH]
        inc ebx
        inc ebx
        int 0x30
        end
        case "access that faults"
        watch 0, SCRATCH, 3, 3
        mov eax, 1
        mov dx, 0
        mov dword [SCRATCH], 0
        end

        case "single step"
        pushfd
        or dword [esp], 0x100
        popfd
        inc ebx
        inc ebx
        end
        case "step over popf that clears TF"
        pushfd
        pushfd
        or dword [esp], 0x100
        popfd
        popfd
        inc ebx
        int 0x30
        end
        case "step over a load of SS"
        pushfd
        or dword [esp], 0x100
        mov ax, DATA0
        popfd
        mov ss, ax
        inc ebx
        inc ebx
        end
        case "step over int"
        pushfd
        or dword [esp], 0x100
        popfd
        int 0x30
        end
        case "step into iret"
        pushfd
        or dword [esp], 0x100
        push CODE0
        push .stepped
        iretd
.stepped: inc ebx
        inc ebx
        end
        case "step of a repeated string"
        mov ecx, 5
        mov edi, SCRATCH
        pushfd
        or dword [esp], 0x100
        popfd
        rep stosb
        nop
        end
        case "step with a breakpoint hit"
        watch 0, SCRATCH, 1, 3
        pushfd
        or dword [esp], 0x100
        popfd
        mov [SCRATCH], eax
        nop
        end
        case "icebp"
        inc ebx
        db 0xf1
        end
        case "general detect"
        mov eax, 0x2400
        mov dr7, eax
        mov ecx, dr0
        end
        case "general detect of a write"
        mov eax, 0x2400
        mov dr7, eax
        mov dr0, ecx
        end
        case "dr4 is dr6"
        mov ebx, dr4
        mov eax, ebx
        int 0x30
        end
        case "dr4 under CR4.DE"
        mov eax, 8
        mov cr4, eax
        mov ebx, dr4
        end
        case "port"
        watch 0, 0x80, 2, 0
        in al, 0x81
        inc ebx
        in al, 0x80
        inc ebx
        end
        case "port of a word access"
        watch 3, 0xe3, 2, 0
        mov dx, 0xe2
        in ax, dx
        end
        case "port written"
        watch 1, 0x80, 2, 3
        mov al, 1
        out 0x83, al
        end
        xor eax, eax
        mov cr4, eax
        case "3: mov from dr7"
        ring3 .dr
.dr:    mov eax, dr7
        end
        case "3: breakpoint"
        watch 0, .user, 0, 0
        ring3 .start
.start: inc ebx
.user:  inc ebx
        end
        case "3: data"
        watch 0, SCRATCH, 3, 0
        ring3 .udata
.udata: mov ax, DATA3
        mov ds, ax
        mov al, [SCRATCH]
        end

        ; Alignment.
        mov eax, cr0
        or eax, 1 << 18
        mov cr0, eax
%macro aligned 2-3 1 << 18 ; case NAME from privilege 3, access
        case %1
        ring3 %%user, %3 | 2
%%user: mov ecx, DATA3
        mov ds, cx
        mov es, cx
        mov ebp, STACK3
        %2
        int 0x30
        end
%endmacro
        aligned "3: aligned doubleword", {mov eax, [SCRATCH + 4]}
        aligned "3: misaligned doubleword", {mov eax, [SCRATCH + 2]}
        aligned "3: misaligned doubleword written", {mov [SCRATCH + 0x22], eax}
        aligned "3: misaligned word", {mov ax, [SCRATCH + 1]}
        aligned "3: byte", {mov al, [SCRATCH + 1]}
        aligned "3: misaligned without AC", {mov eax, [SCRATCH + 2]}, 0
        aligned "3: misaligned locked", {lock inc dword [SCRATCH + 0x31]}
        aligned "3: misaligned quadword of x87", {fld qword [SCRATCH + 4]}
        aligned "3: misaligned across pages", {mov eax, [SCRATCH + 0xffe]}
        case "0: misaligned"
        push 1 << 18 | 2
        popfd
        mov eax, [SCRATCH + 1]
        int 0x30
        end
        power_off
